"""What an adapter layer answers when its weight is read, beside the definitions in float64 numpy."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from adapted_layers import adapt, branches
from reference import branches as ref
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from qlora_kit import AdapterError, AdapterLayer, LoraConfig, apply_lora, quantize_
from qlora_kit.layers.weight_in_effect import InEffect

# Each with the layout of its weight: from the (out, in) matrix.
KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[np.ndarray], np.ndarray]]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda matrix: matrix),
    "conv1d": (lambda: Conv1D(8, 12), lambda matrix: matrix.T),
    "embedding": (lambda: nn.Embedding(11, 6), lambda matrix: matrix.T),
    "depthwise": (lambda: nn.Conv1d(6, 6, 4, groups=6), lambda matrix: matrix.reshape(6, 1, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=2), lambda matrix: matrix.reshape(8, 2, 3, 3)),
}
every_kind = pytest.mark.parametrize(("build", "laid_out"), KINDS.values(), ids=KINDS)


def double(kind: Callable[[], nn.Module], adapters: int = 2) -> AdapterLayer:
    torch.manual_seed(0)
    base = kind().double()
    return adapt(base, adapters=adapters, fan_in_fan_out=isinstance(base, Conv1D))[1]


@every_kind
def test_it_is_the_sum_in_the_weights_own_layout(
    build: Callable[[], nn.Module], laid_out: Callable[[np.ndarray], np.ndarray]
) -> None:
    layer = double(build)
    expected = ref.array(layer.base_layer.weight) + laid_out(np.asarray(ref.delta(branches(layer))))
    np.testing.assert_allclose(ref.array(layer.weight.clone()), expected, rtol=1e-12, atol=1e-12)


@every_kind
def test_gradients_reach_the_factors_and_a_weight_that_is_trained(
    build: Callable[[], nn.Module], laid_out: Callable[[np.ndarray], np.ndarray]
) -> None:
    layer = double(build)
    layer.base_layer.weight.requires_grad_(True)
    factors = [factor for name in layer.active_adapters for factor in layer.adapter_tensors(name).values()]
    gradient = torch.randn(layer.base_layer.weight.shape, dtype=torch.float64)
    found = torch.autograd.grad((layer.weight * gradient).sum(), [layer.base_layer.weight, *factors])
    assert torch.equal(found[0], gradient)
    matrix = layer.codec.matrix_of(gradient).numpy()
    expected = [part for A, B, s in branches(layer) for part in (s * B.T @ matrix, s * matrix @ A.T)]
    for one, other in zip(found[1:], expected, strict=True):
        np.testing.assert_allclose(one.numpy().reshape(other.shape), other, rtol=1e-12, atol=1e-12)


def test_it_is_what_forward_multiplies_by() -> None:
    layer = double(lambda: nn.Linear(12, 8)).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(x @ layer.weight.T + layer.bias, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_has_the_bases_dtype_and_is_summed_in_the_adapters(dtype: torch.dtype) -> None:
    _, layer = adapt(nn.Linear(12, 8).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.weight.clone()
    A, B = layer.factors("a0")
    right = (layer.base_layer.weight.float() + layer.scaling["a0"] * (B @ A)).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, right)


def test_what_is_known_without_it_computes_nothing() -> None:
    _, layer = adapt(nn.Linear(12, 8))
    weight = layer.weight
    assert isinstance(weight, InEffect)
    assert (weight.dtype, weight.device, weight.shape, weight.size(0)) == (
        torch.float32,
        torch.device("cpu"),
        (8, 12),
        8,
    )
    assert weight.ndim == weight.dim() == 2
    assert weight.numel() == 96
    assert len(weight) == 8
    assert weight.requires_grad
    assert isinstance(weight, Tensor)
    assert not weight.terms.computed
    assert torch.isfinite(weight).all()
    assert weight.terms.computed


@pytest.mark.parametrize("state", ["disabled", "merged", "not active"])
def test_without_an_adapter_in_effect_it_is_the_bases_parameter(state: str) -> None:
    lora, layer = adapt(nn.Linear(12, 8))
    if state == "disabled":
        with lora.disable_adapter():
            assert layer.weight is layer.base_layer.weight
    elif state == "merged":
        lora.merge_adapter()
        assert layer.weight is layer.base_layer.weight
    else:
        layer.active_adapters = []
        assert layer.weight is layer.base_layer.weight


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_of_few_bits_it_is_what_is_stored(bits: int) -> None:
    net = quantize_(nn.ModuleDict({"layer": nn.Linear(64, 32)}), bits)
    lora = apply_lora(net, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    (layer,) = lora.adapter_layers().values()
    assert layer.weight is layer.base_layer.weight


class Product(torch.autograd.Function):
    """x W^T as kernels are written: with its own backward, which keeps the tensors that it was given."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


@pytest.mark.parametrize("way", ["kernel", "checkpointed", "vmap", "compiled"])
@pytest.mark.slow
def test_kernels_and_transforms_compute_with_it(way: str) -> None:
    lora, layer = adapt(nn.Linear(12, 8, bias=False).double())
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def read(x: Tensor) -> Tensor:
        if way == "kernel":
            return Product.apply(x, layer.weight)
        if way == "vmap":
            return torch.vmap(lambda row: layer.weight @ row)(x)
        return x @ layer.weight.T

    def gradients(y: Tensor) -> list[Tensor]:
        wanted = [x, *(p for p in lora.parameters() if p.requires_grad)]
        return list(torch.autograd.grad(y.square().sum(), wanted))

    function = {
        "checkpointed": lambda x: checkpoint(read, x, use_reentrant=False),
        "compiled": torch.compile(read, backend="eager"),
    }.get(way, read)
    y, right = function(x), layer(x)
    torch.testing.assert_close(y, right, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients(y), gradients(right), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.zero_(),
        lambda weight: weight.add_(1),
        lambda weight: weight.mul_(torch.ones(12)),
        lambda weight: weight.data.copy_(torch.zeros(8, 12)),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: setattr(weight, "data", torch.zeros(8, 12)),
        lambda weight: torch.zeros(8, 12, out=weight),
        lambda weight: nn.init.normal_(weight),
    ],
)
@torch.no_grad()
def test_writing_that_would_be_lost_is_refused(write: Callable[[Tensor], object]) -> None:
    _, layer = adapt(nn.Linear(12, 8))
    before = layer.base_layer.weight.clone()
    with pytest.raises(AdapterError, match="expected a weight that is stored, found that of an adapter layer"):
        write(layer.weight)
    assert torch.equal(layer.base_layer.weight, before)


@torch.no_grad()
def test_scaling_by_a_number_reaches_base_and_branches() -> None:
    lora, layer = adapt(nn.Linear(12, 8, bias=False))
    x = torch.randn(3, 12)
    before = layer(x)
    layer.weight.div_(4)
    assert torch.equal(layer(x), before / 4)
    layer.weight *= 2
    assert torch.equal(layer(x), before / 2)
    lora.add_adapter("later", LoraConfig(r=2, lora_alpha=2, target_modules=["layer"], init_lora_weights=False))
    assert layer.scaling["later"] == 0.5
    layer.weight.mul_(2)
    assert torch.equal(layer(x), before)
    assert layer.scaling["later"] == 1


def test_assigning_reaches_the_base() -> None:
    _, layer = adapt(nn.Linear(12, 8))
    new, bias = nn.Parameter(torch.zeros(8, 12)), nn.Parameter(torch.ones(8))
    layer.weight, layer.bias = new, bias
    assert layer.base_layer.weight is new
    assert layer.base_layer.bias is bias
    assert not {"weight", "bias"} & set(layer._parameters)
    layer.weight.requires_grad = False
    assert not new.requires_grad
    layer.weight.requires_grad_(True)
    assert new.requires_grad


def test_a_trained_copy_answers_with_its_own() -> None:
    net = nn.ModuleDict({"layer": nn.Linear(12, 8), "head": nn.Linear(8, 4)})
    lora = apply_lora(net, LoraConfig(r=2, target_modules=["layer"], modules_to_save=["head"]))
    saved = lora.saved_modules()["head"]
    copied = saved.modules_to_save["default"]
    assert saved.weight is copied.weight
    with lora.disable_adapter():
        assert saved.weight is saved.original_module.weight
    saved.bias = nn.Parameter(torch.ones(4))
    assert torch.equal(copied.bias, torch.ones(4))
    assert not saved._parameters


def test_layers_are_copied_and_saved_as_ever() -> None:
    lora, layer = adapt(nn.Linear(12, 8))
    assert torch.equal(copy.deepcopy(layer).weight.clone(), layer.weight.clone())
    assert not any(name.endswith(".layer.weight") for name in lora.state_dict())
