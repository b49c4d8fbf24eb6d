"""Every codec under every layer family on a GPU: forward and gradients against float64, in both forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from modules_on_device import LINEARS, STORED_BY_BITSANDBYTES, int8, is_transposed, seeded
from on_device import DEVICE, DTYPES, HALVES, need_dtype
from reference import branches as ref
from torch import Tensor, nn

from qlora_kit import AdapterLayer, codec_for

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("form")]
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "1d": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 2, "dilation": 2, "padding_mode": "circular"}),
    "2d": (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "padding": 1, "groups": 2, "stride": 2}),
}
# An odd number, one (which bitsandbytes multiplies by another kernel where no gradient is wanted), none, and more than
# any kernel takes at once.
ROWS = [(2, 3), (1,), (0,), (150,)]


def needs_bitsandbytes(kind: str) -> None:
    if kind in STORED_BY_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")


def on_device(base: nn.Module, **config: Any) -> tuple[AdapterLayer, np.ndarray, np.ndarray | None]:
    """The layer over ``base``, moved; its weight as the CPU reads it, and its bias."""
    weight = codec_for(base).read(base).double().numpy()
    bias = getattr(base, "bias", None)
    _, layer = adapt(base.to(DEVICE), adapters=2, fan_in_fan_out=is_transposed(base), **config)
    return layer, weight, None if bias is None else ref.array(bias)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device=DEVICE, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", LINEARS)
def test_linear(kind: str, rows: tuple[int, ...], dtype: torch.dtype) -> None:
    need_dtype(dtype)
    needs_bitsandbytes(kind)
    layer, weight, bias = on_device(LINEARS[kind](dtype))
    x = random(*rows, weight.shape[1], dtype=dtype).requires_grad_()
    grad = random(*rows, weight.shape[0], dtype=dtype)
    y = layer(x)
    assert (y.dtype, y.device.type) == (dtype, DEVICE)
    expected = ref.linear(ref.array(x), weight, bias, branches(layer))
    assert_near(y, expected, dtype, "y")
    y.backward(grad)
    grad_x, factors = ref.linear_gradients(ref.array(x), weight, branches(layer), ref.array(grad))
    assert x.grad is not None
    assert_near(x.grad, grad_x, dtype, "x")
    for name, expected_grads in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), expected_grads, strict=True):
            assert (parameter.dtype, parameter.device.type) == (torch.float32, DEVICE)
            assert parameter.grad is not None
            assert_near(parameter.grad, gradient, dtype, name)
    with torch.no_grad():
        assert_near(layer.eval()(x), expected, dtype, "y in evaluation")


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_int8(dtype: torch.dtype, train: bool) -> None:
    """bitsandbytes rounds the base's inputs to 8 bits too, 2 % of its output; the branch is as exact as elsewhere."""
    need_dtype(dtype)
    pytest.importorskip("bitsandbytes")
    layer, weight, bias = on_device(int8(dtype))
    layer.train(train)
    x, grad = random(40, 64, dtype=dtype).requires_grad_(), random(40, 48, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert distance(y, ref.linear(ref.array(x), weight, bias, branches(layer))) < 0.02
    y.backward(grad)
    grad_x, factors = ref.linear_gradients(ref.array(x), weight, branches(layer), ref.array(grad))
    assert x.grad is not None
    assert distance(x.grad, grad_x) < 0.02
    for name, expected in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), expected, strict=True):
            assert parameter.grad is not None
            assert_near(parameter.grad, gradient, dtype, name)


def distance(found: Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ref.array(found) - expected) / np.linalg.norm(expected))


@every_dtype
def test_embedding(dtype: torch.dtype) -> None:
    need_dtype(dtype)
    base = seeded(nn.Embedding, 11, 6, padding_idx=2).to(dtype)
    layer, weight, _ = on_device(base)
    ids = torch.tensor([[0, 2, 10], [2, 5, 5]])
    y = layer(ids.to(DEVICE))
    assert y.dtype == dtype
    assert_near(y, ref.embedding(ids.numpy(), weight, branches(layer)), dtype)
    y.sum().backward()
    counts = np.bincount(ids.numpy().ravel(), minlength=11).astype(float)
    counts[2] = 0.0
    for name, (_, B, s) in zip(layer.active_adapters, branches(layer), strict=True):
        assert_near(layer.lora_embedding_A[name].grad, s * B.sum(0)[:, None] * counts[None], dtype, name)


@every_dtype
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolution(kind: str, dtype: torch.dtype) -> None:
    need_dtype(dtype)
    made, settings = CONVOLUTIONS[kind]
    base: Any = seeded(made, 4, 8, **settings).to(dtype)
    weight, bias = ref.array(base.weight), None if base.bias is None else ref.array(base.bias)
    layer, *_ = on_device(base)
    x = random(2, 4, *(7, 6, 5)[: len(base.kernel_size)], dtype=dtype).requires_grad_()
    y = layer(x)
    geometry = {name: getattr(base, name) for name in ("stride", "padding", "dilation", "groups")}
    expected = ref.convolution(ref.array(x), weight, bias, branches(layer), **geometry, mode=base.padding_mode)
    assert_near(y, expected, dtype)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert_near(x.grad, dense_gradient(base, x.detach(), layer), dtype, "x")


def dense_gradient(base: Any, x: Tensor, layer: AdapterLayer) -> np.ndarray:
    """Of x, through one dense convolution in float64 on the CPU with the deltas in its weight."""
    delta = torch.from_numpy(np.asarray(ref.delta(branches(layer)))).view(base.weight.shape)
    tensors = {"weight": base.weight.detach().cpu().double() + delta}
    if base.bias is not None:
        tensors["bias"] = base.bias.detach().cpu().double()
    x = x.cpu().double().requires_grad_()
    base.cpu()
    torch.func.functional_call(base, tensors, (x,)).square().sum().backward()
    return ref.array(x.grad)
