"""The memory that an undoable merge leaves a weight with, wherever the merge is made."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from qlora_kit import LoraConfig, LoraModel, MergeError, apply_lora, merge


def filled(dtype: torch.dtype) -> LoraModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["0", "2"]))
    for layer in lora.adapter_layers().values():
        layer.set_factors_("default", *(torch.randn_like(factor) for factor in layer.factors("default")))
    return lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("whole", [False, True], ids=["merge_adapter", "merge"])
def test_a_merge_in_inference_mode_leaves_weights_that_can_be_trained_through(dtype: torch.dtype, whole: bool) -> None:
    lora, x = filled(dtype), torch.randn(3, 6, dtype=dtype, requires_grad=True)
    expected = lora(x).detach()
    other = copy.deepcopy(lora)
    with torch.inference_mode():
        if whole:
            merged = merge(other).model
        else:
            lora.merge_adapter()
            merged = lora
        tolerance = 1e-5 if dtype is torch.float32 else 0.1
        torch.testing.assert_close(merged(x), expected, atol=tolerance, rtol=tolerance)
    merged(x).float().square().sum().backward()
    assert x.grad is not None
    if not whole:
        lora.unmerge_adapter()
        assert torch.equal(lora(x).detach(), expected)
        lora(x).float().square().sum().backward()
        assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)


def test_offloaded_weights_are_refused_by_name() -> None:
    lora = filled(torch.float32)
    cpu_offload(lora.model, execution_device=torch.device("cpu"))
    with pytest.raises(MergeError, match=r"^0: expected a weight in memory, found one on the meta device"):
        lora.merge_adapter()
