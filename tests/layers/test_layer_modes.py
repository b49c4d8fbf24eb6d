"""Dropout, autocast, empty batches, switching off, fresh adapters: on every kind of base layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from reference import branches as ref
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.layers import LinearAdapter
from qlora_kit.layers.fused.mask import Mask

Build = Callable[[], tuple[nn.Module, Tensor]]
KINDS: dict[str, Build] = {
    "linear": lambda: (nn.Linear(64, 24), torch.randn(3, 64)),
    "conv1d": lambda: (Conv1D(24, 64), torch.randn(3, 64)),
    "embedding": lambda: (nn.Embedding(11, 6), torch.tensor([[1, 4], [0, 10]])),
    "conv2d": lambda: (nn.Conv2d(4, 8, 3, groups=2), torch.randn(2, 4, 6, 6)),
    "4-bit": lambda: (Linear4bit(64, 24, quant_type="nf4").to("cpu"), torch.randn(3, 64)),
    "4-bit, odd": lambda: (Linear4bit(96, 37, quant_type="nf4").to("cpu"), torch.randn(3, 96)),
    "8-bit": lambda: (Linear8bitLt(64, 24, has_fp16_weights=False).to("cpu"), torch.randn(3, 64)),
}
every_kind = pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
# What bitsandbytes says of float32 and bfloat16 inputs to its int8 product.
casts = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def options(base: nn.Module) -> dict[str, bool]:
    return {"fan_in_fan_out": isinstance(base, Conv1D)}


@casts
@every_kind
@pytest.mark.parametrize("train", [True, False])
def test_switched_off_is_the_base_bit_for_bit(build: Build, train: bool) -> None:
    base, x = build()
    lora, layer = adapt(base, adapters=2, **options(base))
    lora.train(train)
    adapted = layer(x)
    with lora.disable_adapter():
        off = layer(x)
    assert torch.equal(off, layer.codec.forward(base, x))
    assert not torch.equal(adapted, off)
    assert torch.equal(layer(x), adapted)


@casts
@every_kind
def test_an_empty_batch(build: Build) -> None:
    base, x = build()
    _, layer = adapt(base, **options(base))
    full = layer(x)
    if isinstance(base, Linear8bitLt):
        with torch.no_grad():  # the stock int8 backward can't take one
            assert layer(x[:0]).shape == (0, *full.shape[1:])
        return
    empty = layer(x[:0])
    assert empty.shape == (0, *full.shape[1:])
    empty.sum().backward()
    for parameter in layer.adapter_tensors("a0").values():
        assert parameter.grad is not None
        assert not parameter.grad.any()


@casts
@every_kind
def test_under_autocast(build: Build) -> None:
    """The products are bfloat16, the factors stay float32 and get float32 gradients."""
    base, x = build()
    _, layer = adapt(base, **options(base))
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert ((y.float() - plain.float()).norm() / plain.float().norm()).item() < 0.03
    y.float().square().sum().backward()
    for parameter in layer.adapter_tensors("a0").values():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.any()


@pytest.mark.parametrize("name", ["linear", "4-bit", "4-bit, odd"])
def test_dropout_acts_on_the_branch_alone_and_in_training_alone(name: str, form: str) -> None:
    base, x = KINDS[name]()
    lora, layer = adapt(base, lora_dropout=0.5)
    frozen = layer.codec.read(base).double().numpy()
    bias = ref.array(base.bias)
    lora.eval()
    assert_near(layer(x), ref.linear(ref.array(x), frozen, bias, branches(layer)), torch.float32)
    lora.train()
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    mask = Mask.draw(0.5) if form == "fused" and isinstance(layer, LinearAdapter) else None  # the same draw
    dropped = nn.functional.dropout(x, 0.5) if mask is None else x * mask.kept(x) * mask.scale
    expected = ref.linear(ref.array(x), frozen, bias, [])
    expected = expected + ref.array(dropped) @ ref.delta(branches(layer)).T
    assert_near(y, expected, torch.float32)
    assert not torch.equal(layer(x), y)
