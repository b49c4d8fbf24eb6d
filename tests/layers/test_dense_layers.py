"""Linear, transposed, embedding and convolution layers with adapters against float64, forward and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import peft
import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from reference import branches as ref
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VARIANTS: list[dict[str, Any]] = [{}, {"adapters": 2}, {"use_rslora": True}]
CONVOLUTIONS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.Conv1d, {"kernel_size": 3}),
    (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 2, "dilation": 2, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "same", "dilation": 2, "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv2d, {"kernel_size": 2, "padding": 1, "padding_mode": "replicate"}),
    (nn.Conv2d, {"kernel_size": 1, "padding": "valid"}),
    (nn.Conv3d, {"kernel_size": 2, "padding": 1, "groups": 2, "stride": 2}),
]


class ScaledEmbedding(nn.Embedding):
    """As Gemma has it."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


def matrix_of(module: nn.Module) -> np.ndarray:
    weight = ref.array(module.weight)
    return weight.T if isinstance(module, (Conv1D, nn.Embedding)) else weight


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_linear(kind: str, variant: dict[str, Any], dtype: torch.dtype, train: bool) -> None:
    """The forward, and the gradients of the input and of every factor."""
    base = nn.Linear(7, 5) if kind == "linear" else Conv1D(5, 7)
    lora, layer = adapt(base.to(dtype), **variant, fan_in_fan_out=kind == "conv1d")
    lora.train(train)
    x = inputs((2, 3, 7), dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    expected = ref.linear(ref.array(x), matrix_of(base), ref.array(base.bias), branches(layer))
    assert_near(y, expected, dtype)
    grad = inputs((2, 3, 5), dtype)
    y.backward(grad)
    grad_x, factors = ref.linear_gradients(ref.array(x), matrix_of(base), branches(layer), ref.array(grad))
    assert_near(x.grad, grad_x, dtype, "x")
    for name, (grad_A, grad_B) in zip(layer.active_adapters, factors, strict=True):
        A, B = layer.adapter_tensors(name).values()
        assert A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_near(A.grad, grad_A, dtype, f"{name} A")
        assert_near(B.grad, grad_B, dtype, f"{name} B")
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", [nn.Embedding, ScaledEmbedding])
def test_embedding(kind: type[nn.Embedding], variant: dict[str, Any], dtype: torch.dtype) -> None:
    base = kind(11, 6, padding_idx=2).to(dtype)
    _, layer = adapt(base, **variant)
    ids = torch.tensor([[0, 2, 10], [2, 5, 5]])
    y = layer(ids)
    assert y.dtype == dtype
    scale = getattr(base, "embed_scale", 1.0)
    assert_near(y, ref.embedding(ids.numpy(), matrix_of(base), branches(layer), scale), dtype)
    y.sum().backward()
    for name, (A, B, s) in zip(layer.active_adapters, branches(layer), strict=True):
        parameter = layer.lora_embedding_A[name]
        counts = np.bincount(ids.numpy().ravel(), minlength=11).astype(float)
        counts[2] = 0.0  # as the base does for its padding index
        assert_near(parameter.grad, scale * s * B.sum(0)[:, None] * counts[None], dtype, "A")
        assert A.shape == parameter.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kind", "settings"), CONVOLUTIONS)
def test_convolution(kind: type[nn.Module], settings: dict[str, Any], dtype: torch.dtype) -> None:
    """The branch is the convolution with the flattened weight s * B @ A, whatever the geometry."""
    base: Any = kind(4, 8, **settings).to(dtype)
    _, layer = adapt(base, adapters=2)
    x = inputs((2, 4, *(7, 6, 5)[: len(base.kernel_size)]), dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    expected = ref.convolution(
        ref.array(x),
        ref.array(base.weight),
        None if base.bias is None else ref.array(base.bias),
        branches(layer),
        stride=base.stride,
        padding=base.padding,
        dilation=base.dilation,
        groups=base.groups,
        mode=base.padding_mode,
    )
    assert_near(y, expected, dtype)
    if dtype == torch.float64:  # the gradients against those of a dense convolution with the merged weight
        y.square().sum().backward()
        grads = {n: [t.grad.clone() for t in layer.adapter_tensors(n).values()] for n in layer.active_adapters}
        free = {n: [t.detach().requires_grad_() for t in layer.factors(n)] for n in layer.active_adapters}
        deltas = [layer.scaling[n] * (B @ A) for n, (A, B) in free.items()]
        weight = base.weight.detach() + sum(deltas).view(base.weight.shape)
        merged = torch.func.functional_call(base, {"weight": weight}, (x.detach(),))
        merged.square().sum().backward()
        for name, factors in free.items():
            for found, parameter in zip(grads[name], factors, strict=True):
                assert torch.allclose(found.flatten(1), parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "build",
    [
        lambda: (nn.Linear(7, 5), torch.randn(3, 7)),
        lambda: (Conv1D(5, 7), torch.randn(3, 7)),
        lambda: (nn.Embedding(11, 6), torch.tensor([[1, 4]])),
        lambda: (nn.Conv2d(4, 8, 3, padding=1, stride=2), torch.randn(2, 4, 6, 6)),
    ],
    ids=["linear", "conv1d", "embedding", "conv2d"],
)
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")
def test_equal_to_peft(build: Any, use_rslora: bool) -> None:
    """Same factors, same output, in float32, to a few roundings."""
    torch.manual_seed(0)
    base, x = build()
    transposed = isinstance(base, Conv1D)
    _, layer = adapt(base, use_rslora=use_rslora, fan_in_fan_out=transposed)
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["layer"], use_rslora=use_rslora, fan_in_fan_out=transposed
    )
    torch.manual_seed(0)
    theirs = peft.inject_adapter_in_model(settings, nn.ModuleDict({"layer": build()[0]}))["layer"]
    for container in layer.factor_names:
        entry = getattr(theirs, container)["default"]
        parameter = entry.weight if isinstance(entry, nn.Module) else entry
        parameter.data.copy_(
            dict(layer.adapter_tensors("a0"))[f"{container}.weight" if parameter is not entry else container]
        )
    assert torch.allclose(layer(x), theirs(x), rtol=1e-6, atol=1e-6)
