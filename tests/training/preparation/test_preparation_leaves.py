"""What preparation did for training leaves with the adapters: dtypes and values, hooks, flags, checkpointing."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import HALF, STORAGES, adapted, batch, llama, load
from torch import Tensor, nn

from qlora_kit import LoraConfig, apply_lora, prepare_model_for_kbit_training


def state(model: nn.Module) -> dict[str, Any]:
    """All that preparation may change of ``model``."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    hooks = {path: (len(m._forward_hooks), len(m._forward_pre_hooks)) for path, m in model.named_modules()}
    return {
        "values": {name: tensor.detach().clone() for name, tensor in tensors.items()},
        "trained": {name for name, p in model.named_parameters() if p.requires_grad},
        "hooks": hooks,
        "checkpointing": getattr(model, "is_activation_checkpointing", False),
        "attributes": set(vars(model)) - {"_require_grads_hooks", "_require_grads_hook"},
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    values, others = found.pop("values"), expected.pop("values")
    assert found == expected
    assert values.keys() == others.keys()
    for name, value in values.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.slow
def test_unload_gives_the_model_from_before(llama_dir: Path, storage: str, dtype: torch.dtype, reentrant: bool) -> None:
    model = load(llama_dir, storage, dtype)
    before = state(model)
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["model.norm"])).train()
    lora(**batch()).loss.backward()
    assert lora.unload() is model
    assert_same(state(model), before)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_head_in_float32_go_back(tied: bool) -> None:
    model = llama(tied).to(torch.bfloat16)
    before = state(model)
    prepare_model_for_kbit_training(model, cast_embeddings=True, cast_head=True)
    model = adapted(model).unload()
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert_same(state(model), before)
    assert model(**batch()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_knows_the_way_back(way: Any) -> None:
    model = llama().to(torch.bfloat16)
    before = state(model)
    prepared = way(prepare_model_for_kbit_training(model))
    assert_same(state(adapted(prepared).unload()), before)


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.batch = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.batch(self.linear(x))


def test_buffers_and_a_part_that_was_prepared() -> None:
    """A part of a model may be prepared alone, and only the norm's statistics of half precision are cast."""
    model = nn.Sequential(Normalized().to(torch.bfloat16), nn.Linear(8, 2, dtype=torch.bfloat16)).eval()
    model[0].linear.requires_grad_(False)
    before = state(model)
    prepare_model_for_kbit_training(model[0])
    assert model[0].batch.running_mean.dtype == torch.float32
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["linear"]))
    assert_same(state(lora.unload()), before)


def test_checkpointing_that_was_on_stays_on(llama_dir: Path) -> None:
    model = load(llama_dir, "dense", torch.bfloat16)
    model.activation_checkpointing_enable()
    prepare_model_for_kbit_training(model)
    assert adapted(model).unload().is_activation_checkpointing


def test_trained_biases_of_norms_leave_with_their_adapter() -> None:
    model = Normalized().to(torch.bfloat16).eval()
    before = state(model)
    lora = apply_lora(prepare_model_for_kbit_training(model), LoraConfig(r=2, target_modules=["linear"], bias="all"))
    with torch.no_grad():
        model.batch.bias += 1.001  # which bfloat16 can't hold
    assert_same(state(lora.unload()), before)
