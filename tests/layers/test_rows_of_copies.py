"""Rows with adapters of their own: where these have trained copies of modules, or a weight is read past its module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora_kit import AdapterError, LoraConfig, LoraModel, apply_lora
from qlora_kit.layers.row_choice import in_rows
from qlora_kit.layers.rows import Rows


class Head(nn.Module):
    """Takes its input by name, with a mask and settings, and gives a tuple with a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 3)

    def forward(self, *, states: Tensor, mask: Tensor, scale: Tensor, **others: Any) -> Any:
        logits = self.out(states * mask[..., None]) * scale
        return logits, {"sum": logits.sum(1), "words": states.shape[1]}


class Net(nn.Module):
    """(rows, words) ids; the head is called with whatever else is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), Head()

    def forward(self, ids: Tensor, **others: Any) -> Any:
        states = torch.tanh(self.body(self.table(ids)))
        scale = torch.tensor(2.0)
        return self.head(states=states, mask=(ids > 2).to(states.dtype), scale=scale, **others)


IDS = torch.arange(20).view(4, 5) % 11


def saved(dtype: torch.dtype = torch.float32) -> LoraModel:
    """Adapter a has copies of head and table, b of the head, and c branches on body and table."""
    torch.manual_seed(0)
    lora = apply_lora(Net().to(dtype), LoraConfig(r=2, target_modules=["body", "table"], init_lora_weights=False), "c")
    lora.add_adapter("a", LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "table"]))
    lora.add_adapter("b", LoraConfig(r=3, target_modules=["body"], modules_to_save=["head"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "modules_to_save" in name or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return lora.eval()


def alone(lora: LoraModel, name: str) -> Any:
    if name == "__base__":
        with lora.disable_adapter():
            return lora(IDS)
    lora.set_adapter(name)
    return lora(IDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("names", ["a b c __base__", "b a b a", "c c b c", "c __base__ c c"])
def test_rows_go_through_their_own_copies(names: str, dtype: torch.dtype) -> None:
    lora, own = saved(dtype), names.split()
    expected = [alone(lora, name) for name in own]
    logits, others = lora(IDS, adapter_names=own)
    assert logits.dtype == dtype
    assert others["words"] == 5
    for row, (right_logits, right_others) in enumerate(expected):
        # Products of fewer rows are summed in another order.
        near = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(logits[row], right_logits[row], **near)
        torch.testing.assert_close(others["sum"][row], right_others["sum"][row], **near)


def test_a_copy_called_on_its_own() -> None:
    lora = saved()
    head = lora.saved_modules()["table"]
    found = head(IDS, adapter_names=["a", "b", "__base__", "a"])
    for row, name in enumerate(["a", None, None, "a"]):
        table = head.modules_to_save[name] if name else head.original_module.base_layer
        assert torch.equal(found[row], table.weight[IDS[row]])


def test_copies_that_cannot_be_called_with_some_of_the_rows_are_refused() -> None:
    lora = saved()
    with pytest.raises(AdapterError, match=r"head: expected a module that can be called with some.*found a Net among"):
        lora(IDS, adapter_names=["a", "b", "a", "b"], cache=Net())
    names = ["a", "b", "a", "b"]
    with in_rows(Rows(names, frozenset(map(id, lora.adapted.parts())))), pytest.raises(AdapterError, match="no tensor"):
        lora.model.head()
    for name in ("a", "b"):
        lora.model.head.modules_to_save[name].forward = _sum
    with pytest.raises(AdapterError, match=r"results of shapes \[\(\), \(\)\]"):
        lora(IDS, adapter_names=["a", "b", "a", "b"])


def _sum(*, states: Tensor, **others: Any) -> Tensor:
    return states.sum()


class Reads(nn.Module):
    """Computes with the weights of its children, which it doesn't call."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, which: str) -> Tensor:
        weight = getattr(self, which).weight
        assert (weight.shape, weight.dtype) == ((4, 4), torch.float32)  # which are the same for all rows
        return x @ weight.T


def test_a_weight_that_is_read_past_its_module() -> None:
    lora = apply_lora(
        Reads(), LoraConfig(r=2, target_modules=["proj"], modules_to_save=["kept"], init_lora_weights=False), "a"
    )
    lora.add_adapter("b", LoraConfig(r=2, target_modules=["proj"], modules_to_save=["kept"], init_lora_weights=False))
    with torch.no_grad():
        lora.model.kept.modules_to_save["b"].weight.mul_(2)
    x = torch.randn(2, 4)
    lora.eval()
    for which in ("proj", "kept"):
        for names in (["b", "b"], ["__base__", "__base__"]):
            assert torch.equal(lora(x, which, adapter_names=names), _with(lora, names[0], x, which))
        with pytest.raises(AdapterError, match=f"{which}: its weight is read past the module.*set_adapter"):
            lora(x, which, adapter_names=["a", "b"])


def _with(lora: LoraModel, name: str, *inputs: Any) -> Tensor:
    before = lora.active_adapters
    if name == "__base__":
        with lora.disable_adapter():
            return lora(*inputs)
    lora.set_adapter(name)
    result = lora(*inputs)
    lora.set_adapter(before)
    return result
