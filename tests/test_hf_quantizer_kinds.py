"""Models whose storage bitsandbytes' own configuration can't describe, saved and loaded again by transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import VOCABULARY, batch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from qlora_kit import quantize_
from qlora_kit.codecs import protect_storage_
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.hf_quantizer import PackedConfig, record_quantization_

QUANTIZED = ("PackedLinear", "Linear4bit", "Linear8bitLt")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def quantized(model: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in model.named_modules() if type(module).__name__ in QUANTIZED}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_of_many_storages_reloads_bit_for_bit(tmp_path: Path, llama_dir: Path, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=dtype).eval()
    quantize_(model, 4, target_modules=["q_proj"], double_quant=True)
    quantize_(model, 8, target_modules=["v_proj"])
    quantize_(model, 2, target_modules=["up_proj"])
    quantize_(model, quant_type="fp4", target_modules=["down_proj"], blocksize=128)
    assert_reloads(model, tmp_path)
    groups = model.config.quantization_config.groups
    assert [(g["quant_type"], g.get("storage")) for g in groups] == [
        *(("nf4", "bitsandbytes"), ("int8", "bitsandbytes")),
        *((DEFAULT_TYPES[2], None), ("fp4", "bitsandbytes")),
    ]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.slow
def test_linears_that_transformers_does_not_convert_reload(tmp_path: Path, bits: int) -> None:
    """Falcon's are of a class of their own."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = quantize_(FalconForCausalLM(FalconConfig(**sizes)).eval(), bits)
    assert len(quantized(model)) == 2 * 4
    assert_reloads(model, tmp_path)
    assert isinstance(model.config.quantization_config, PackedConfig)


def test_an_architecture_that_transformers_takes_apart_reloads(tmp_path: Path) -> None:
    """For bitsandbytes it makes linears of Llama 4's stacked experts, which aren't what was stored."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, num_hidden_layers=2)).eval()
    assert_reloads(quantize_(model, 4, target_modules=["q_proj", "o_proj"]), tmp_path)


def assert_reloads(model: Any, folder: Path) -> None:
    """Saved, loaded, saved and loaded again, ``model`` computes the same, dequantized too."""
    protect_storage_(model)
    record_quantization_(model)
    before = logits(model)
    for name in ("first", "second"):
        model.save_pretrained(folder / name)
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=model.dtype).eval()
        protect_storage_(model)
        assert torch.equal(logits(model), before)
    kinds = {path: type(module) for path, module in quantized(model).items()}
    dense = model.dequantize()
    assert kinds
    assert all(type(dense.get_submodule(path)) is nn.Linear for path in kinds)
