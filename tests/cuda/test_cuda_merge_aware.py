"""Layers that compute with the weight as it will be merged, on a GPU: against float64, and the bits of a merge."""

from __future__ import annotations

import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from modules_on_device import LINEARS, STORED_BY_BITSANDBYTES
from on_device import DEVICE, DTYPES, need_dtype
from reference import branches as ref
from reference import merge_aware as reference

from qlora_kit import codec_for, merge

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("form")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LINEARS)
def test_forward_gradients_and_the_merge(kind: str, dtype: torch.dtype) -> None:
    need_dtype(dtype)
    if kind in STORED_BY_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    base = LINEARS[kind](dtype)
    into = "same" if codec_for(base).quantizer(base) is not None else "nf3"
    lora, layer = adapt(base.to(DEVICE), adapters=2, merge_aware=into)
    lora.train()
    out, fan_in = codec_for(layer.base_layer).shape(layer.base_layer)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, fan_in, generator=generator).to(DEVICE, dtype).requires_grad_()
    grad = torch.randn(2, 3, out, generator=generator).to(DEVICE, dtype)
    held = layer.as_merged(layer.active_adapters)
    assert held is not None
    stored = held.codec.read(held.module)
    weight, own, bias = ref.array(stored), branches(layer), layer.base_layer.bias
    y = layer(x)
    assert (y.dtype, y.device.type) == (dtype, DEVICE)
    assert_near(y, reference.forward(ref.array(x), weight, None if bias is None else ref.array(bias)), dtype, "y")
    y.backward(grad)
    of_x, _, factors = reference.gradients(ref.array(x), weight, own, ref.array(grad))
    assert_near(x.grad, of_x, dtype, "x")
    for name, expected in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), expected, strict=True):
            assert_near(parameter.grad, gradient, dtype, name)
    merged = merge(lora).model["layer"]
    assert torch.equal(codec_for(merged).read(merged), stored)
