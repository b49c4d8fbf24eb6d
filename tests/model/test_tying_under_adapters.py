"""Trainers and frameworks call a model's ``tie_weights`` while adapters are on it: the base's tables stay one, and what
the adapters made of them stays theirs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from tiny_llama import batch, llama
from torch import Tensor

from qlora_kit import LoraConfig, LoraModel, apply_lora

pytestmark = pytest.mark.filterwarnings("ignore:.*its weight is tied to:UserWarning")

WAYS: dict[str, dict[str, Any]] = {
    "a branch on the embeddings": {"target_modules": ["embed_tokens"]},
    "a branch on the head": {"target_modules": ["lm_head"]},
    "one on each": {"target_modules": ["embed_tokens", "lm_head"]},
    "one on both": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "a copy of the embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "a copy of the head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "one copy": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**batch()).logits


def trained(way: str) -> tuple[LoraModel, Tensor]:
    base = llama(tie_word_embeddings=True)
    without = logits(base)
    lora = apply_lora(base, LoraConfig(r=4, **WAYS[way]))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return lora, without


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_nothing_moves(way: str) -> None:
    lora, without = trained(way)
    expected = logits(lora)
    for model in (lora, lora.model, copy.deepcopy(lora), pickle.loads(pickle.dumps(lora))):
        model.tie_weights()
        assert torch.equal(logits(model), expected)
    with lora.disable_adapter():
        lora.tie_weights()
        assert torch.equal(logits(lora), without)
    base = lora.unload()
    assert torch.equal(logits(base), without)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert "tie_weights" not in vars(base)


@pytest.mark.parametrize("way", WAYS)
def test_while_merged(way: str) -> None:
    lora, without = trained(way)
    before = logits(lora)
    lora.merge_adapter()
    merged = logits(lora)
    lora.tie_weights()
    assert torch.equal(logits(lora), merged)
    lora.unmerge_adapter()
    assert torch.equal(logits(lora), before)
    with lora.disable_adapter():
        assert torch.equal(logits(lora), without)


def test_tables_that_came_apart_are_tied_again() -> None:
    lora, without = trained("a branch on the head")
    expected, head = logits(lora), lora.model.lm_head
    head.base_layer.weight = torch.nn.Parameter(torch.zeros_like(head.base_layer.weight), requires_grad=False)
    lora.tie_weights()
    assert head.base_layer.weight is lora.model.model.embed_tokens.weight
    assert torch.equal(logits(lora), expected)
    assert torch.equal(logits(lora.unload()), without)


def test_an_adapter_added_while_another_is_merged() -> None:
    lora, without = trained("one on each")
    before = logits(lora)
    lora.merge_adapter()
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    with lora.disable_adapter():
        assert torch.equal(logits(lora), without)
    lora.unmerge_adapter()
    assert torch.equal(logits(lora), before)
