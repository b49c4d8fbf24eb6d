"""What a caller has switched on around it changes nothing in what adapters learn, and is on again afterwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from learners import changed, labels_of, lively, rows, started, state
from torch import Tensor

from loftq import distill, soft_labels
from qlora_kit import LoraModel

Around = Callable[[], AbstractContextManager[object]]


def learned(lora: LoraModel, around: Around = nullcontext) -> dict[str, Tensor]:
    """The factors, when labels were taken and learned from inside ``around()``."""
    original = lively()
    with around():
        distill(lora, soft_labels(original, rows()), learning_rate=1e-3)
    return {name: tensor for name, tensor in state(lora).items() if "lora_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_that_are_off_are_taken_all_the_same(around: Around) -> None:
    plain, found = learned(started("nf4")), learned(started("nf4"), around)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_labels_of_an_inference_can_be_learned_from_anywhere() -> None:
    with torch.inference_mode():
        labels = soft_labels(lively(), [{"inputs_embeds": torch.randn(12, 5, 64)}])
    lora = started("nf4")
    before = state(lora)
    assert distill(lora, labels, learning_rate=1e-3).kept
    assert changed(before, lora)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_reads_factors_as_they_are_at_each_step(dtype: torch.dtype) -> None:
    """It keeps what it has cast until its block ends, and what an evaluation has made it cast gets no gradients."""
    lora = started("signed2").eval()
    before = state(lora)
    with torch.autocast("cpu", dtype):
        first = lora(input_ids=rows()).logits
        found = distill(lora, labels_of(24), learning_rate=3e-3)
        after = lora(input_ids=rows()).logits
        assert torch.is_autocast_cache_enabled()
        again = lora(input_ids=rows()).logits
    assert found.kept
    assert found.after < 0.97 * found.before
    names = {name for name in changed(before, lora) if "lora_" in name}
    assert len(names) == 2 * len(lora.adapter_layers()), "every factor has got a gradient"
    assert not torch.equal(first, after), "what was cast before is forgotten"
    assert torch.equal(after, again)


@pytest.mark.slow
def test_a_compiled_model_learns_the_same() -> None:
    plain, lora = learned(started("bfloat16")), started("bfloat16")
    learned(torch.compile(lora, backend="eager"))  # type: ignore[arg-type]
    found = state(lora)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_gradients_of_others_stay() -> None:
    lora = started("nf4", modules_to_save=["lm_head"])
    [head] = [parameter for name, parameter in lora.named_parameters() if "modules_to_save" in name]
    head.grad = torch.ones_like(head)
    learned(lora)
    assert torch.equal(head.grad, torch.ones_like(head))
