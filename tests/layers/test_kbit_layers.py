"""Adapters on 4-bit and 8-bit layers: forward and gradients against weights that the reference dequantizes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from reference import branches as ref
from reference import quantization
from torch import nn

from qlora_kit import AdapterLayer, LoraConfig, apply_lora

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
# (out, in): out % 32 and in % 64 zero and not; 96 and 160 are where the stock CPU kernels take wrong scales.
SHAPES = [(32, 64), (37, 96), (40, 160), (33, 128)]
GRAD = 7


def four_bit(
    out: int,
    fan_in: int,
    *,
    quant_type: str = "nf4",
    double_quant: bool = False,
    storage: torch.dtype = torch.uint8,
    blocksize: int = 64,
    dtype: torch.dtype = torch.float32,
) -> Linear4bit:
    """As bitsandbytes makes one, unprotected."""
    module = Linear4bit(
        fan_in, out, compute_dtype=dtype, quant_type=quant_type, compress_statistics=double_quant, quant_storage=storage
    )
    module.weight.blocksize = blocksize
    return module.to("cpu")


def check(layer: AdapterLayer, weight: np.ndarray, bias: np.ndarray, dtype: torch.dtype) -> None:
    """Forward, and gradients of the input and of the factors, on one batch."""
    generator = torch.Generator().manual_seed(GRAD)
    x = torch.randn(2, 3, weight.shape[1], generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(2, 3, weight.shape[0], generator=generator).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert_near(y, ref.linear(ref.array(x), weight, bias, branches(layer)), dtype, "y")
    layer.zero_grad()
    y.backward(grad)
    grad_x, factors = ref.linear_gradients(ref.array(x), weight, branches(layer), ref.array(grad))
    assert_near(x.grad, grad_x, dtype, "x")
    for name, expected in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), expected, strict=True):
            assert parameter.dtype == torch.float32
            assert_near(parameter.grad, gradient, dtype, name)


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("out", "fan_in"), SHAPES)
def test_four_bits_in_training_and_evaluation(
    out: int, fan_in: int, quant_type: str, double_quant: bool, storage: torch.dtype
) -> None:
    """Training, an evaluation that could repack the weight, and training again: the same right numbers."""
    base = four_bit(out, fan_in, quant_type=quant_type, double_quant=double_quant, storage=storage)
    weight, bias, codes = quantization.read_linear4bit(base), ref.array(base.bias), base.weight.data.clone()
    lora, layer = adapt(base, adapters=2)
    check(layer, weight, bias, torch.float32)
    lora.eval()
    with torch.no_grad():
        x = torch.randn(4, fan_in)
        assert_near(layer(x), ref.linear(ref.array(x), weight, bias, branches(layer)), torch.float32)
    check(layer, weight, bias, torch.float32)
    check(lora.train().adapter_layers()["layer"], weight, bias, torch.float32)
    assert torch.equal(base.weight.data.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("blocksize", [32, 128, 256, 512, 4096])
def test_other_blocksizes(blocksize: int) -> None:
    base = four_bit(36, 160, blocksize=blocksize)
    weight, bias = quantization.read_linear4bit(base), ref.array(base.bias)
    _, layer = adapt(base)
    check(layer, weight, bias, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("out", "fan_in"), SHAPES)
def test_half_precision(out: int, fan_in: int, dtype: torch.dtype) -> None:
    base = four_bit(out, fan_in, dtype=dtype)
    weight, bias = quantization.read_linear4bit(base), ref.array(base.bias)
    lora, layer = adapt(base)
    check(layer, weight, bias, dtype)
    check(lora.eval().adapter_layers()["layer"], weight, bias, dtype)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_cast_of_the_model_and_a_copy_of_it(storage: torch.dtype) -> None:
    """Packed codes in a float-typed tensor are no numbers; a cast must leave them, a copy must have its own."""
    base = four_bit(32, 64, storage=storage, double_quant=True)
    weight, bias, codes = quantization.read_linear4bit(base), ref.array(base.bias), base.weight.data.clone()
    lora, layer = adapt(base)
    lora.to(torch.float32)
    check(layer, weight, bias, torch.float32)
    for cast in (torch.bfloat16, torch.float32):
        lora.to(cast)
    assert torch.equal(base.weight.data.view(torch.uint8), codes.view(torch.uint8))
    twin = copy.deepcopy(lora).adapter_layers()["layer"]
    twin.base_layer.weight.data.view(torch.uint8).zero_()
    assert torch.equal(base.weight.data.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("forwarded", [False, True], ids=["new", "after a forward"])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("out", "fan_in"), SHAPES)
def test_eight_bits(out: int, fan_in: int, train: bool, forwarded: bool) -> None:
    """The base's int8 product is 16-bit inside and in evaluation quantizes its input too; the branch is exact."""
    base = Linear8bitLt(fan_in, out, has_fp16_weights=False).to("cpu").train(train)
    weight = quantization.read_int8(base.weight.data.numpy(), base.weight.SCB.numpy())
    if forwarded:  # after which the scales live elsewhere
        base(torch.randn(2, fan_in))
    lora, layer = adapt(base)
    lora.train(train)
    x = torch.randn(5, fan_in, requires_grad=True)
    expected = ref.linear(ref.array(x), weight, ref.array(base.bias), branches(layer))
    y = layer(x)
    assert np.linalg.norm(ref.array(y) - expected) / np.linalg.norm(expected) < 0.012
    with lora.disable_adapter():
        off = layer(x)
    branch = ref.linear(ref.array(x), np.zeros_like(weight), None, branches(layer))
    assert_near(y - off, branch, torch.float32, "branch")
    grad = torch.randn(5, out)
    y.backward(grad)
    grad_x, ((grad_A, grad_B),) = ref.linear_gradients(ref.array(x), weight, branches(layer), ref.array(grad))
    A, B = layer.adapter_tensors("a0").values()
    assert_near(A.grad, grad_A, torch.float32, "A")
    assert_near(B.grad, grad_B, torch.float32, "B")
    assert np.linalg.norm(ref.array(x.grad) - grad_x) / np.linalg.norm(grad_x) < 0.01


def test_layers_of_awkward_shapes_without_an_adapter_are_right_too() -> None:
    """Beside an adapted layer, on the CPU; their hooks fire and their copies compute alike."""
    odd = four_bit(37, 96)
    weight, bias = quantization.read_linear4bit(odd), ref.array(odd.bias)
    model: Any = nn.Sequential(odd, nn.Linear(37, 4))
    seen: list[int] = []
    odd.register_forward_hook(lambda *_: seen.append(1))
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["1"]))
    x = torch.randn(3, 96, requires_grad=True)
    for module in (lora.model[0], copy.deepcopy(lora).model[0]):
        y = module(x)
        assert_near(y, ref.linear(ref.array(x), weight, bias, []), torch.float32)
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert_near(grad, np.broadcast_to(weight.sum(0), (3, 96)), torch.float32)
    assert seen == [1, 1]
    adapted = apply_lora(lora.unload(), LoraConfig(r=2, target_modules=["0"]))
    adapted(x)
    assert len(seen) == 3
