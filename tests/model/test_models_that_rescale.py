"""RWKV halves layers of its later blocks in the first forward in eval mode: adapters that come, go, switch or are
merged after that, and files written after it, are those of the weights at full size."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import RwkvConfig, RwkvForCausalLM

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge

CONFIG = LoraConfig(r=2, target_modules=["output", "value"])
TOKENS = torch.arange(8)[None]


def bare() -> RwkvForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "attention_hidden_size": 16, "num_hidden_layers": 4, "context_length": 16}
    return RwkvForCausalLM(RwkvConfig(vocab_size=32, rescale_every=2, **sizes)).eval()


def adapted(model: RwkvForCausalLM, name: str = "default") -> LoraModel:
    return fill(apply_lora(model, CONFIG, name).eval(), name)


def fill(lora: LoraModel, name: str) -> LoraModel:
    torch.manual_seed(1)
    for layer in lora.adapter_layers().values():
        layer.set_factors_(name, *(0.3 * torch.randn_like(factor) for factor in layer.factors(name)))
    return lora


@torch.no_grad()
def logits(model: object) -> Tensor:
    return model(TOKENS).logits  # type: ignore[operator, no-any-return]


@pytest.fixture
def right() -> tuple[Tensor, Tensor]:
    """Without and with the adapter."""
    return logits(bare()), logits(adapted(bare()))


def test_switched_off_first_and_on_again(right: tuple[Tensor, Tensor]) -> None:
    lora = adapted(bare())
    with lora.disable_adapter():
        assert torch.equal(logits(lora), right[0])
    assert torch.equal(logits(lora), right[1])
    with lora.disable_adapter():
        assert torch.equal(logits(lora), right[0])


def test_wrapped_after_a_forward(right: tuple[Tensor, Tensor]) -> None:
    model = bare()
    logits(model)
    lora = adapted(model)
    assert torch.equal(logits(lora), right[1])
    assert all(layer.scaling["default"] in (4.0, 2.0) for layer in lora.adapter_layers().values())
    assert torch.equal(logits(lora.unload()), right[0])


def test_a_second_adapter_after_a_forward(right: tuple[Tensor, Tensor]) -> None:
    lora = adapted(bare(), "first")
    logits(lora)
    lora.add_adapter("second", LoraConfig(r=2, target_modules=["value"]))
    lora.set_adapter("second")
    assert torch.equal(logits(lora.eval()), right[0])
    lora.set_adapter("first")
    assert torch.equal(logits(lora.eval()), right[1])


def test_merged_before_a_forward_and_unmerged_after(right: tuple[Tensor, Tensor]) -> None:
    lora = adapted(bare())
    lora.merge_adapter()
    torch.testing.assert_close(logits(lora), right[1])
    with lora.disable_adapter():
        assert torch.equal(logits(lora), right[0])
    torch.testing.assert_close(logits(lora), right[1])
    lora.unmerge_adapter()
    assert torch.equal(logits(lora), right[1])


def test_files_hold_the_weights_at_full_size(right: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    lora = adapted(bare())
    logits(lora)
    lora.model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(RwkvForCausalLM.from_pretrained(tmp_path / "base").eval()), right[0])
    assert torch.equal(logits(lora), right[1])
    merged = merge(copy.deepcopy(lora)).model
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), right[1])
    torch.testing.assert_close(logits(RwkvForCausalLM.from_pretrained(tmp_path / "merged").eval()), right[1])
