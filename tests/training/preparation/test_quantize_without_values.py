"""A model on the meta device is quantized to the same bytes as one with values, and called to the same shapes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from qlora_kit import LoraConfig, apply_lora, quantize_
from qlora_kit.codecs import codec_for


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["int8", "nf4", "nf3", "signed2", "affine3", "uniform8"])
def test_bytes_and_shapes(quant_type: str, double_quant: bool) -> None:
    if quant_type == "int8" and double_quant:
        pytest.skip("rows have one scale each")
    net = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 37, bias=False)).to(torch.bfloat16)
    empty = copy.deepcopy(net).to("meta")
    for one in (net, empty):
        quantize_(one, quant_type=quant_type, double_quant=double_quant, target_modules=["0", "1"])
    for real, hollow in zip(net, empty, strict=True):
        assert type(hollow) is type(real)
        stored = [(t.shape, t.dtype) for t in codec_for(real).stored(real)]
        assert [(t.shape, t.dtype) for t in codec_for(hollow).stored(hollow)] == stored
    lora = apply_lora(empty, LoraConfig(r=2, target_modules=["0", "1"]))
    out = lora(torch.empty(3, 5, 96, dtype=torch.bfloat16, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((3, 5, 37), torch.bfloat16, "meta")
    out.sum().backward()
    assert all(p.grad is not None for p in lora.parameters() if p.requires_grad)
