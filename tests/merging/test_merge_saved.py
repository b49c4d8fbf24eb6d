"""Merged models through transformers' ``save_pretrained`` and ``from_pretrained``, whatever they were loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import llama
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qlora_kit import LoraConfig, apply_lora, merge, quantize_
from qlora_kit.codecs import protect_storage_
from qlora_kit.hf_quantizer import record_quantization_

IDS = torch.arange(2, 26).view(2, 12)
FOUR_BIT = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(1)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    return GPT2LMHeadModel(config).eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def adapted(model: nn.Module) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, lora_alpha=8)
    return apply_lora(model, config).eval()


@pytest.mark.parametrize("into", ["same", "bfloat16", "nf3"])
@pytest.mark.slow
def test_a_model_loaded_from_quantized_files(tmp_path: Path, into: str) -> None:
    """transformers would undo the steps by which it loaded them, and has no way to."""
    llama().save_pretrained(tmp_path / "full")
    AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=FOUR_BIT).save_pretrained(
        tmp_path / "four"
    )
    model = merge(adapted(AutoModelForCausalLM.from_pretrained(tmp_path / "four")), into=into, force=True).model
    expected = logits(model)
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    protect_storage_(again)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("storage", ["bitsandbytes", "packed", "packed and loaded"])
def test_layers_that_were_transposed_become_so_again(tmp_path: Path, storage: str) -> None:
    """GPT-2's layers are (in, out) in its checkpoints, and (out, in) in any quantized storage."""
    gpt2().save_pretrained(tmp_path / "full")
    if storage == "bitsandbytes":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "full", quantization_config=FOUR_BIT)
    else:
        base = quantize_(gpt2(), 3)
    if storage == "packed and loaded":
        record_quantization_(base)
        base.save_pretrained(tmp_path / "packed")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    lora = adapted(base)
    expected = logits(lora)
    model = merge(lora, into="float32").model
    assert {
        type(m).__name__ for m in model.transformer.h.modules() if hasattr(m, "weight") and m.weight.dim() == 2
    } == {"Conv1D"}
    model.save_pretrained(tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
