"""A merge takes back what preparation did for training, so that what it leaves can be saved, loaded and run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_llama import STORAGES, batch, llama, load
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge, prepare_model_for_kbit_training
from qlora_kit.merging import in_memory

# Rows of 96 values, on which the stock 4-bit forward is wrong or fails, are avoided: here all are blocks of 64.
BLOCKS = {"intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks")
    llama(**BLOCKS).to(torch.bfloat16).save_pretrained(path)
    return path


def prepared(model: nn.Module, **changes: Any) -> LoraModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **changes)
    return apply_lora(prepare_model_for_kbit_training(model), config).eval()


def runs(model: nn.Module) -> torch.Tensor:
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.mark.parametrize(
    ("storage", "into"),
    [
        *((storage, "same") for storage in STORAGES),
        ("dense", "nf4"),
        ("dense", "int8"),
        ("4-bit", "int8"),
        ("8-bit", "nf3"),
    ],
)
@pytest.mark.slow
def test_saved_and_loaded_it_runs(folder: Path, tmp_path: Path, storage: str, into: str) -> None:
    base = load(folder, storage, torch.bfloat16)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    norms = {name: p.clone() for name, p in base.named_parameters() if "norm" in name}
    model = merge(prepared(base), into=into, force=True).model
    for name, norm in norms.items():
        found = model.get_parameter(name)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, norm)
    assert all(name in trained for name, p in model.named_parameters() if p.requires_grad)
    assert all(model.get_parameter(name).requires_grad for name in norms)
    assert not model.is_activation_checkpointing
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(runs(again), runs(model))


def test_merge_and_unload_does_the_same() -> None:
    model = prepared(llama().to(torch.bfloat16)).merge_and_unload()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_trained_copies_and_biases_are_in_the_models_dtype() -> None:
    model = llama(attention_bias=True).to(torch.bfloat16)
    lora = prepared(model, modules_to_save=["model.norm"], bias="all")
    with torch.no_grad():
        lora.model.get_submodule("model.norm").modules_to_save["default"].weight += 0.5
    model = merge(lora).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.norm.weight, torch.full((64,), 1.5, dtype=torch.bfloat16))
    assert runs(model).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_residual_stays_on_a_model_that_can_be_saved(folder: Path, tmp_path: Path) -> None:
    base = load(folder, "4-bit", torch.bfloat16)
    trained = {name for name, p in base.named_parameters() if p.requires_grad}
    lora = merge(prepared(base), residual_rank=2).model
    assert isinstance(lora, LoraModel)
    assert {p.dtype for n, p in lora.named_parameters() if "norm" in n} == {torch.bfloat16}
    assert not any(p.requires_grad for p in lora.parameters())
    expected = runs(lora)
    lora.save_pretrained(tmp_path / "residual")
    model = lora.unload()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(runs(LoraModel.from_pretrained(again, tmp_path / "residual" / "residual")), expected)


def test_after_an_error_it_is_prepared_still(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = prepared(llama(attention_bias=True).to(torch.bfloat16), bias="all")
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "bias" in name:
                parameter += 1.001  # which bfloat16 can't hold
    state = {name: p.detach().clone() for name, p in lora.named_parameters()}
    checkpoints, expected = lora.is_activation_checkpointing, runs(lora)
    hooks = {path: copy.copy(m._forward_pre_hooks) for path, m in lora.named_modules()}

    def interrupted(model: nn.Module) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(in_memory, "release_from_float32_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(lora)
    found = dict(lora.named_parameters())
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items())
    assert hooks == {path: m._forward_pre_hooks for path, m in lora.named_modules()}
    assert lora.is_activation_checkpointing == checkpoints
    assert torch.equal(runs(lora), expected)
