"""A LoftQ adapter on other bases: the original, one quantized plainly, one that was trained and evaluated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from tiny_llama import batch, llama
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, quantize_
from qlora_kit.adapter_files.backbone import METADATA_KEY, fingerprint
from qlora_kit.codecs.bnb import quantize_linear
from qlora_kit.errors import StorageError
from qlora_kit.hf_quantizer import record_quantization_


def four_bit(weight: torch.Tensor, storage: torch.dtype = torch.uint8) -> Linear4bit:
    return quantize_linear(nn.Linear(64, 32), weight, quant_storage=storage)


def started(folder: Path, bits: int = 2) -> LoraModel:
    loftq = LoftQConfig(loftq_bits=bits, loftq_iter=3, method="loftq")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq)
    return apply_lora(AutoModelForCausalLM.from_pretrained(folder), config)


def saved(folder: Path, out: Path, bits: int = 2) -> None:
    lora = started(folder, bits)
    lora.save_pretrained(out / "adapter")
    base = lora.unload()
    record_quantization_(base)
    base.save_pretrained(out / "base")


def metadata(folder: Path) -> dict[str, str]:
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return file.metadata()


def test_reads_the_codes_however_they_are_stored() -> None:
    weight = torch.randn(32, 64)
    expected = fingerprint({"a": four_bit(weight)})
    assert fingerprint({"a": four_bit(weight, torch.bfloat16)}) == expected
    assert fingerprint({"b": four_bit(weight)}) != expected
    assert fingerprint({"a": four_bit(weight.flip(0))}) != expected
    linear = nn.Linear(8, 8).bfloat16()
    assert fingerprint({"a": linear}) == fingerprint({"a": linear.float()}), "the same values in another dtype"


def test_the_order_of_modules_doesn_t_matter() -> None:
    one, two = four_bit(torch.randn(32, 64)), four_bit(torch.randn(32, 64))
    assert fingerprint({"a": one, "b": two}) == fingerprint({"b": two, "a": one})
    assert fingerprint({"a": one, "b": two}) != fingerprint({"a": two, "b": one})


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_loading_on_another_base_is_an_error(bits: int, llama_dir: Path, tmp_path: Path) -> None:
    saved(llama_dir, tmp_path, bits)
    adapter = tmp_path / "adapter"
    LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    others = {
        "the original": AutoModelForCausalLM.from_pretrained(llama_dir),
        "quantized plainly": quantize_(AutoModelForCausalLM.from_pretrained(llama_dir), bits),
    }
    for model in others.values():
        modules = dict(model.named_modules())
        with pytest.raises(StorageError, match=r"expected the quantized base model that this adapter was started on"):
            LoraModel.from_pretrained(model, adapter)
        assert dict(model.named_modules()) == modules, "the model is as it was"
        LoraModel.from_pretrained(model, adapter, check_backbone=False)


def test_a_second_adapter_is_checked_too(llama_dir: Path, tmp_path: Path) -> None:
    saved(llama_dir, tmp_path)
    lora = apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(StorageError, match="started on"):
        lora.load_adapter(tmp_path / "adapter", "other")
    assert list(lora.peft_config) == ["default"]
    lora.load_adapter(tmp_path / "adapter", "other", check_backbone=False)
    assert list(lora.peft_config) == ["default", "other"]


def test_saving_again_keeps_it(llama_dir: Path, tmp_path: Path) -> None:
    saved(llama_dir, tmp_path)
    lora = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    lora.save_pretrained(tmp_path / "again")
    assert metadata(tmp_path / "again") == metadata(tmp_path / "adapter")
    assert METADATA_KEY in metadata(tmp_path / "again")


def test_training_and_forwards_don_t_change_it(llama_dir: Path, tmp_path: Path) -> None:
    lora = started(llama_dir, 4)
    before = dict(lora.backbones)
    lora.train()(**batch()).loss.backward()
    lora.eval()(**batch())
    bases = {path: layer.base_layer for path, layer in lora.adapter_layers().items()}
    assert {"default": fingerprint(bases)} == before


def test_other_starts_carry_none_and_load_anywhere(tmp_path: Path) -> None:
    apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert METADATA_KEY not in metadata(tmp_path)
    LoraModel.from_pretrained(quantize_(llama(), 2), tmp_path)
