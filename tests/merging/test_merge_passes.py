"""What a merge does to each weight, counted: it is added to once and looked at once, and no copy of it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.naming import Tree

SHAPE = (24, 40)


class Passes(TorchDispatchMode):
    """Counts the functions that work on the values of a whole weight, those that only look at its memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if any(sorted(tensor.shape) == sorted(SHAPE) for tensor in tensors) and not func.is_view:
            self.found[func.__name__.partition(".")[0]] += 1
        return result


def adapted(dtype: torch.dtype) -> LoraModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.Tanh(), nn.Embedding(*SHAPE)).to(dtype)
    return apply_lora(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))


@pytest.mark.parametrize(
    ("action", "dtype", "passes"),
    [
        # The table is stored transposed, and so its sum is put in that order.
        (LoraModel.merge_adapter, torch.float32, {"addmm": 2, "sum": 2, "clone": 1}),
        # Widened for the sum, and rounded once.
        (LoraModel.merge_adapter, torch.bfloat16, {"_to_copy": 4, "addmm_": 2, "sum": 2, "clone": 1}),
        # Copied for the way back, and the sum is made in the weight's own memory, table or not.
        (LoraModel.merge_and_unload, torch.float32, {"copy_": 2, "addmm_": 2, "sum": 2}),
        (LoraModel.merge_and_unload, torch.bfloat16, {"copy_": 4, "_to_copy": 4, "addmm_": 2, "sum": 2}),
    ],
)
def test_each_weight_is_added_to_once_and_looked_at_once(
    action: Callable[[LoraModel], object], dtype: torch.dtype, passes: dict[str, int]
) -> None:
    lora = adapted(dtype)
    with Passes() as counted:
        action(lora)
    assert counted.found == passes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_that_is_merged_for_good_keeps_its_memory(dtype: torch.dtype) -> None:
    lora = adapted(dtype)
    memory = [layer.base_layer.weight.data_ptr() for layer in lora.adapter_layers().values()]
    merged = lora.merge_and_unload()
    assert [merged[0].weight.data_ptr(), merged[2].weight.data_ptr()] == memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weight_from_before_is_kept_as_it_is_and_not_copied(dtype: torch.dtype) -> None:
    lora = adapted(dtype)
    weights = [layer.base_layer.weight for layer in lora.adapter_layers().values()]
    memory, before = [weight.data_ptr() for weight in weights], [weight.detach().clone() for weight in weights]
    lora.merge_adapter()
    assert [layer._unmerged.data_ptr() for layer in lora.adapter_layers().values()] == memory
    assert not any(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))
    lora.unmerge_adapter()
    assert all(torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_around_a_merge_changes_no_bit_of_it(dtype: torch.dtype) -> None:
    plain, under = adapted(dtype), adapted(dtype)
    plain.merge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under.merge_adapter()
    for one, other in zip(plain.model.parameters(), under.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_deleting_an_adapter_maps_the_model_once_before_and_once_after(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted(torch.float32)
    lora.add_adapter("other", lora.peft_config["default"])
    maps, init = [], Tree.__init__

    def counted(self: Tree, model: nn.Module) -> None:
        maps.append(model)
        init(self, model)

    monkeypatch.setattr(Tree, "__init__", counted)
    lora.delete_adapter("other")
    assert len(maps) == 2
    lora.delete_adapter("default")
    assert lora.adapter_layers() == {}
