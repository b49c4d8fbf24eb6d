"""Buffers that aren't saved, after a merge into another dtype: as in a model that was loaded in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import llama
from torch import Tensor, nn
from transformers import M2M100Config, M2M100ForConditionalGeneration, XGLMConfig, XGLMForCausalLM

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.merging import in_memory

IDS = torch.arange(5, 13)[None]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
SIZES = {"vocab_size": 64, "d_model": 64, "max_position_embeddings": 64}


def xglm() -> nn.Module:
    return XGLMForCausalLM(XGLMConfig(**SIZES, ffn_dim=64, num_layers=1, attention_heads=4)).eval()


def m2m100() -> nn.Module:
    sides = {f"{s}_{key}": n for s in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return M2M100ForConditionalGeneration(M2M100Config(**SIZES, **sides, **heads)).eval()


def adapted(model: nn.Module) -> LoraModel:
    torch.manual_seed(0)
    return apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS, labels=IDS).logits


@pytest.mark.parametrize("make", [xglm, m2m100])
@pytest.mark.parametrize("into", list(DTYPES))
def test_positions_that_are_added_to_the_states_follow(tmp_path: Path, make: Any, into: str) -> None:
    model = merge(adapted(make()), into=into).model
    assert {b.dtype for b in buffers(model).values() if b.is_floating_point()} == {DTYPES[into]}
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=DTYPES[into])
    assert all(torch.equal(buffers(again)[name], buffer) for name, buffer in buffers(model).items())
    assert torch.equal(logits(again), logits(model))


def test_rotary_frequencies_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    before = buffers(llama())
    after = buffers(merge(adapted(llama()), into="bfloat16").model)
    assert all(
        torch.equal(after[name], buffer) and after[name].dtype == buffer.dtype for name, buffer in before.items()
    )


def test_a_class_that_cannot_be_built_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("not without its tokenizer")

    lora = adapted(xglm())
    monkeypatch.setattr(XGLMForCausalLM, "_from_config", fails)
    model = merge(lora, into="bfloat16").model
    assert {b.dtype for b in buffers(model).values() if b.is_floating_point()} == {torch.float32}


def test_after_an_error_they_are_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapted(xglm())
    before = {name: buffer.clone() for name, buffer in buffers(lora.model).items()}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(in_memory, "forget_loading_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(lora, into="bfloat16")
    found = buffers(lora.model)
    assert all(
        torch.equal(found[name], buffer) and found[name].dtype == buffer.dtype for name, buffer in before.items()
    )
