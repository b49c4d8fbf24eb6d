"""A base that was quantized in memory, saved by the calls that come to mind, and loaded again by transformers alone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import batch, llama
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_kit import (
    AdapterError,
    LoftQConfig,
    LoraConfig,
    LoraModel,
    StorageError,
    apply_lora,
    merge,
    prepare_model_for_kbit_training,
    quantize_,
)
from qlora_kit.codecs import protect_storage_

STORAGES: dict[str, dict[str, Any]] = {
    "nf4": {"loftq_bits": 4},
    "nf4, scales in 8 bits": {"loftq_bits": 4, "double_quant": True},
    "int8": {"loftq_bits": 8},
    "2 bits": {"loftq_bits": 2},
    "mixed": {"loftq_bits": 4, "bits_pattern": {"q_proj": 2, "mlp.up_proj": 3}},
}
WAYS: dict[str, Callable[[Any, LoraModel], Any]] = {
    "the model that was wrapped": lambda model, lora: model,
    "get_base_model": lambda model, lora: lora.get_base_model(),
    "unload": lambda model, lora: lora.unload(),
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**batch()).logits


def started(model: Any, targets: Any = "all-linear", lora: Any = None, **loftq: Any) -> LoraModel:
    """Adapters that LoftQ began in five steps, and that were trained since."""
    config = LoraConfig(
        r=4,
        target_modules=targets,
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_iter=5, method="loftq", **loftq),
        **(lora or {}),
    )
    return trained(apply_lora(model, config))


@torch.no_grad()
def trained(lora: LoraModel) -> LoraModel:
    generator = torch.Generator().manual_seed(1)
    for parameter in lora.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return lora


def loaded(folder: Path) -> Any:
    """The model, every weight of it from the folder."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    protect_storage_(model)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_base_and_adapter_reload_bit_for_bit(llama_dir: Path, tmp_path: Path, storage: str, way: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    lora = started(model, **STORAGES[storage])
    expected = logits(lora)
    with lora.disable_adapter():
        base = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    WAYS[way](model, lora).save_pretrained(tmp_path / "base")
    again = loaded(tmp_path / "base")
    assert torch.equal(logits(again), base)
    assert torch.equal(logits(LoraModel.from_pretrained(again, tmp_path / "adapter")), expected)
    dense = AutoModelForCausalLM.from_pretrained(llama_dir)
    with pytest.raises(StorageError, match="expected the quantized base model that this adapter was started on"):
        LoraModel.from_pretrained(dense, tmp_path / "adapter")


def test_what_was_trained_beside_the_factors_is_not_the_bases(llama_dir: Path, tmp_path: Path) -> None:
    beside = {"bias": "all", "modules_to_save": ["lm_head", "model.norm"]}
    model = llama(attention_bias=True)
    lora = started(model, ["q_proj", "v_proj"], lora=beside, loftq_bits=4)
    with lora.disable_adapter():
        base = logits(lora)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), base)


def test_what_was_prepared_is_saved_as_it_was(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    lora = apply_lora(prepare_model_for_kbit_training(model), LoraConfig(r=4, target_modules=["q_proj"]))
    lora.get_base_model().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == types


def test_the_adapter_names_the_base_that_was_saved(llama_dir: Path, tmp_path: Path) -> None:
    lora = started(AutoModelForCausalLM.from_pretrained(llama_dir), loftq_bits=4)
    lora.get_base_model().save_pretrained(tmp_path / "base")
    lora.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str((tmp_path / "base").resolve())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_base_that_was_loaded_quantized_is_saved(llama_dir: Path, tmp_path: Path, way: str) -> None:
    """transformers itself can't save such a model a second time."""
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    AutoModelForCausalLM.from_pretrained(llama_dir, quantization_config=nf4).save_pretrained(tmp_path / "nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    lora = started(model, loftq_bits=4, weights=str(llama_dir))
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "adapter")
    WAYS[way](model, lora).save_pretrained(tmp_path / "base")
    assert torch.equal(logits(LoraModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "adapter")), expected)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_quantize_made_is_saved_under_adapters_and_without(llama_dir: Path, tmp_path: Path, bits: int) -> None:
    model = quantize_(AutoModelForCausalLM.from_pretrained(llama_dir), bits)
    protect_storage_(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "without")
    trained(apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))).get_base_model().save_pretrained(
        tmp_path / "under"
    )
    for name in ("without", "under"):
        assert torch.equal(logits(loaded(tmp_path / name)), expected)


def test_the_model_keeps_its_own_way_of_saving_once_no_adapter_is_left(llama_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir)
    lora = apply_lora(model, LoraConfig(r=4, target_modules="all-linear"))
    for copied in (copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        copied.get_base_model().save_pretrained(tmp_path / "copied")
        assert torch.equal(logits(loaded(tmp_path / "copied")), logits(llama()))
    assert lora.unload() is model
    assert "save_pretrained" not in vars(model)
    lora = trained(apply_lora(model, LoraConfig(r=4, target_modules="all-linear")))
    merged: Any = merge(lora, into="float32").model
    assert "save_pretrained" not in vars(merged)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(loaded(tmp_path / "merged")), logits(merged))


def test_what_can_not_be_saved_says_what_can(llama_dir: Path, tmp_path: Path) -> None:
    lora = apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear"))
    lora.merge_adapter()
    with pytest.raises(AdapterError, match=r"unmerge_adapter\(\) first, or save the merged model: merge\(lora\).model"):
        lora.get_base_model().save_pretrained(tmp_path)
    merge(lora)
    with pytest.raises(AdapterError, match=r"merged model is saved by report\.model\.save_pretrained\(folder\)"):
        lora.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
