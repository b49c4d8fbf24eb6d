"""The life of an adapter on a model of 4 or 2 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lives import Life, Training, has_folder, merged, off, stage
from torch import nn

from qlora_kit import codec_for, prepare_model_for_kbit_training, quantize_
from qlora_kit.codecs import protect_storage_

# As for a merge in 32 bits, and once more for the order of the products inside a layer.
FLOAT32 = 1e-3
# Roundings of three digits, where norms were computed in float32 before and are in bfloat16 now.
BFLOAT16 = 0.02


@stage("4 bits", of=lambda member: has_folder(member) and member.targets == "all-linear")
def four_bits(life: Life) -> None:
    """On what transformers' loader makes of it."""
    _on_few_bits(life, 4, lambda: life.member.load(life.base_folder, quantization_config=_nf4(torch.float32)))


@stage("4 bits in memory")
def four_bits_in_memory(life: Life) -> None:
    """On what ``quantize_`` makes of it, bitsandbytes' layers."""
    _on_few_bits(life, 4, lambda: quantize_(life.member.make(), 4, target_modules=life.member.targets))


@stage("2 bits")
def two_bits(life: Life) -> None:
    """On what ``quantize_`` packs."""
    _on_few_bits(life, 2, lambda: quantize_(life.member.make(), 2, target_modules=life.member.targets))


def _on_few_bits(life: Life, bits: int, make: Callable[[], nn.Module]) -> None:
    """It trains, and merges: into 32 bits exactly, and into its own storage as if these were quantized anew."""
    lora = life.adapted(make())
    storages = {path: codec_for(layer.base_layer).name for path, layer in lora.adapter_layers().items()}
    quantized = [path for path, storage in storages.items() if storage in ("bnb-4bit", "packed")]
    assert quantized
    adapted = life.output(lora)
    assert torch.isfinite(adapted).all()
    assert not torch.equal(life.output(Training(lora, life.member).lora), adapted)
    exact = merged(life.adapted(make()))
    assert off(life.output(exact), adapted) < FLOAT32
    same = merged(life.adapted(make()), "same")
    assert {path: codec_for(same.get_submodule(path)).name for path in storages} == storages
    anew = quantize_(exact, bits, target_modules=quantized)
    assert off(life.output(same), life.output(anew)) < FLOAT32


@stage("prepared", of=has_folder)
def prepared(life: Life) -> None:
    """In 16 bits it runs with its norms in float32."""
    model = prepare_model_for_kbit_training(life.member.load(life.base_folder, dtype=torch.bfloat16), False)
    assert torch.isfinite(life.output(model, torch.bfloat16)).all()


@stage("4 bits saved", of=lambda member: has_folder(member) and member.targets == "all-linear")
def four_bits_saved(life: Life) -> None:
    """Prepared, adapted, merged into its own storage, saved and loaded: it runs, and computes the same."""
    model = life.member.load(life.base_folder, dtype=torch.bfloat16, quantization_config=_nf4(torch.bfloat16))
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = merged(life.adapted(model), "same")
    right = life.output(model, torch.bfloat16)
    folder = life.fresh_folder("merged-4-bits")
    model.save_pretrained(folder)
    again = life.output(_readable(life.member.load(folder)), torch.bfloat16)
    assert off(again, right) < BFLOAT16


def _readable(model: nn.Module) -> nn.Module:
    """``model`` with our reading of 4-bit rows that aren't whole blocks, where bitsandbytes' own on a CPU is wrong."""
    protect_storage_(model)
    return model


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
