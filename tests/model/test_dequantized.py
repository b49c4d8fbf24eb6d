"""transformers' ``model.dequantize()`` under adapters: the layers follow their new base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import batch, llama, load
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge, quantize_
from qlora_kit.codecs import codec_for
from qlora_kit.hf_quantizer import record_quantization_

# Float32 sums in another order; 8-bit linears round their activations to 8 bits besides, so theirs is a few per mille.
OFF = {"4-bit": 1e-5, "packed": 1e-5, "8-bit": 0.02}
# Of a scale over 127, which transformers multiplies by a rounded 1 / 127 and the codec divides.
ONE_ROUNDING = {"rtol": 3e-7, "atol": 0.0, "check_stride": False}
PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose rows are whole blocks, and of the same in 3 bits."""
    path = tmp_path_factory.mktemp("blocks")
    llama(intermediate_size=128).save_pretrained(path / "dense")
    packed = quantize_(llama(intermediate_size=128), 3)
    record_quantization_(packed)
    packed.save_pretrained(path / "packed")
    return path


def adapted(folder: Path, storage: str) -> LoraModel:
    if storage == "packed":
        model: Any = LlamaForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)
    else:
        model = load(folder / "dense", storage, torch.float32)
    torch.manual_seed(1)
    return apply_lora(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=batch()["input_ids"]).logits


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.slow
@pytest.mark.parametrize("storage", list(OFF))
def test_it_computes_trains_and_merges(folder: Path, tmp_path: Path, storage: str) -> None:
    lora = adapted(folder, storage)
    before = logits(lora)
    weight = lora.adapter_layers()[PATH].codec.read(lora.adapter_layers()[PATH].base_layer)
    trained = {name for name, p in lora.named_parameters() if p.requires_grad}
    assert lora.dequantize() is lora
    assert {name for name, p in lora.named_parameters() if p.requires_grad} == trained
    layer = lora.adapter_layers()[PATH]
    assert type(layer.base_layer) is nn.Linear
    assert layer.codec is codec_for(layer.base_layer)
    torch.testing.assert_close(layer.base_layer.weight.detach(), weight, **ONE_ROUNDING)
    assert not layer.base_layer.weight.requires_grad
    after = logits(lora)
    assert off(after, before) < OFF[storage]
    lora.train()(**batch()).loss.backward()
    assert all(p.grad is not None for n, p in lora.named_parameters() if "lora_" in n)
    model = merge(lora.eval(), into="float32").model
    assert off(logits(model), after) < OFF["4-bit"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("storage", list(OFF))
def test_a_merged_adapter_can_still_be_taken_out(folder: Path, storage: str) -> None:
    lora = adapted(folder, storage)
    layer = lora.adapter_layers()[PATH]
    base = layer.codec.read(layer.base_layer)
    lora.merge_adapter()
    merged = layer.codec.read(layer.base_layer)
    lora.dequantize()
    torch.testing.assert_close(layer.base_layer.weight.detach(), merged, **ONE_ROUNDING)
    assert layer.merged_adapters == ["default"]
    lora.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, base)
    assert torch.equal(lora.unload().get_submodule(PATH).weight, base)
