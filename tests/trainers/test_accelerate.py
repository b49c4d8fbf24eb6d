"""A loop of one's own with accelerate: states of the whole model, saved and restored in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_llama import STORAGES, batch, llama, load
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training, quantize_

# bitsandbytes says so of each int8 product.
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_state() -> Any:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def adapter_model(folder: Path, storage: str, seed: int = 0) -> LoraModel:
    if storage == "packed":
        model: Any = llama()
        quantize_(model, bits=3)
    else:
        model = load(folder, storage, torch.float32)
    prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    settings = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["norm"])
    return apply_lora(model, settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@pytest.mark.parametrize("storage", [*STORAGES, "packed"])
@pytest.mark.slow
def test_load_state_restores_bit_for_bit(storage: str, folder: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    lora = adapter_model(folder, storage)
    trained = [p for p in lora.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(lora, torch.optim.AdamW(trained, 1e-2))

    def step() -> None:
        accelerator.backward(model(**batch()).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    before, weights = logits(model), [p.detach().clone() for p in trained]
    accelerator.save_state(str(tmp_path))
    step()
    after = logits(model)
    assert not torch.equal(after, before)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(p, kept) for p, kept in zip(trained, weights, strict=True))
    step()
    assert torch.equal(logits(model), after)
    assert accelerator.unwrap_model(model) is lora


@pytest.mark.parametrize("storage", [*STORAGES, "packed"])
@pytest.mark.slow
def test_a_whole_state_goes_into_another_model(storage: str, folder: Path) -> None:
    """Of other weights too: what a k-bit layer keeps beside its codes is restored with them."""
    lora, other = adapter_model(folder, storage), adapter_model(folder, storage, seed=9)
    for module in other.modules():
        scales: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if scales is not None:
            scales.absmax = torch.zeros_like(scales.absmax)
    before = logits(lora)
    state = {key: value.clone() for key, value in lora.state_dict().items()}
    assert not other.load_state_dict(state).unexpected_keys
    assert torch.equal(logits(other), before)
    # In DDP's and torch.compile's wrappers a model's own load_state_dict isn't called.
    holder = nn.Module()
    holder.module = other
    holder.load_state_dict({f"module.{key}": value for key, value in state.items()})
    assert torch.equal(logits(other), before)
    twin = copy.deepcopy(other)
    twin.load_state_dict(twin.state_dict())
    assert torch.equal(logits(twin), before)


@pytest.mark.parametrize(("storage", "key"), [("4-bit", "weight.absmax"), ("8-bit", "SCB")])
def test_a_state_of_another_format_is_refused(storage: str, key: str, folder: Path) -> None:
    lora = adapter_model(folder, storage)
    before, state = logits(lora), dict(lora.state_dict())
    layer = "model.model.layers.0.self_attn.q_proj.base_layer."
    other = nn.Sequential(nn.Linear(64, 64, bias=False))
    quantize_(other, quant_type="fp4" if storage == "4-bit" else "int8")
    own = {layer + name.removeprefix("0."): value for name, value in other.state_dict().items()}
    if storage == "8-bit":
        own = {f"{layer}weight": torch.zeros(8, 8, dtype=torch.int8), f"{layer}SCB": torch.ones(8)}
    state = {name: value for name, value in state.items() if not name.startswith(f"{layer}weight.")} | own
    with pytest.raises(RuntimeError, match=r"weight: expected .* found .*; load"):
        lora.load_state_dict(state)
    assert torch.equal(logits(lora), before)
