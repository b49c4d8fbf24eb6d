"""What the fused form of a linear layer keeps, computes and refuses; its numbers against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adapted_layers import branches
from fused_bases import BASES, casts, fused_layer, packed
from reference import branches as ref
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_kit
from qlora_kit import AdapterError, ConfigError
from qlora_kit.codecs import codec_for
from qlora_kit.layers.fused import linear as fused
from qlora_kit.layers.fused import thin
from qlora_kit.layers.fused.choice import why_plain


def kept(layer: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """What a forward keeps for the backward, parameters left out, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            found[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for x in inputs:
            layer(x)
    return list(found.values())


# -- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [3, 40])  # few: products of the tokens; many: s B A added to the weight
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(tokens: int, adapters: int, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fused_layer(nn.Linear(7, 5).double(), adapters, lora_dropout=dropout)
    factors = [f for name in layer.active_adapters for f in layer.adapter_tensors(name).values()]
    layer.base_layer.bias.requires_grad_()
    x = torch.randn(tokens, 7, dtype=torch.float64, requires_grad=True)

    def call(*_: Tensor) -> Tensor:
        torch.manual_seed(0)  # the same masks
        return layer(x)

    assert why_plain(layer, x, layer.active_adapters) is None
    torch.autograd.gradcheck(call, (x, layer.base_layer.bias, *factors))


@casts
@pytest.mark.parametrize("way", ["cast", "halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BASES)
def test_half_precision_within_its_bound(
    name: str, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On either way of thin products: the output within 2 u (|y| + |y0|), gradients within 8 u of the largest."""
    if way == "halves":
        monkeypatch.setattr(thin, "_in_halves", lambda x: x.dtype in (torch.bfloat16, torch.float16))
        monkeypatch.setattr(fused, "_rows", lambda x, dtype: fused._flat(x).to(dtype))
    layer = fused_layer(BASES[name](dtype), 2)
    W = ref.array(codec_for(layer.base_layer).read(layer.base_layer))
    bias = ref.array(layer.base_layer.bias)
    x = torch.randn(4, 9, 64).to(dtype).requires_grad_()
    grad = torch.randn(4, 9, 24).to(dtype)
    y = layer(x)
    y.backward(grad)
    unit = torch.finfo(dtype).eps / 2
    exact = ref.linear(ref.array(x), W, bias, branches(layer))
    base = ref.linear(ref.array(x), W, bias, [])
    assert y.dtype == dtype
    assert (np.abs(ref.array(y) - exact) <= 2 * unit * (np.abs(exact) + np.abs(base)) + 4 * unit).all()
    grad_x, factors = ref.linear_gradients(ref.array(x), W, branches(layer), ref.array(grad))
    found = [x, *(f for n in layer.active_adapters for f in layer.adapter_tensors(n).values())]
    for tensor, expected in zip(found, [grad_x, *(f for pair in factors for f in pair)], strict=True):
        assert tensor.grad is not None
        error = np.abs(ref.array(tensor.grad).reshape(expected.shape) - expected).max()
        assert error <= 8 * unit * np.abs(expected).max()


@casts
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    layer = fused_layer(BASES[name](torch.float32), 2)
    x = torch.randn(4, 64, requires_grad=True)
    found = {}
    for kind in ("plain", "fused"):
        with qlora_kit.set_branch(kind), torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        (y.float() ** 2).sum().backward()
        found[kind] = [y, *(t.grad for t in (x, *layer.adapter_tensors("a0").values()))]
        for tensor in (x, *layer.parameters()):
            tensor.grad = None
    for plain, ours in zip(found["plain"], found["fused"], strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).abs().max() <= 16 * torch.finfo(dtype).eps * plain.abs().max()


@casts
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_half_precision(name: str, dtype: torch.dtype) -> None:
    """Gradients come in the factors' dtype, and both forms give the same to its rounding."""
    layer = fused_layer(BASES[name](dtype), 2)
    for adapter in layer.active_adapters:
        for factor in layer.adapter_tensors(adapter).values():
            factor.data = factor.data.bfloat16()
    factors = [f for adapter in layer.active_adapters for f in layer.adapter_tensors(adapter).values()]
    x, grad = torch.randn(6, 64).to(dtype).requires_grad_(), torch.randn(6, 24).to(dtype)
    found: dict[str, list[Tensor]] = {}
    for kind in ("plain", "fused"):
        with qlora_kit.set_branch(kind):
            y = layer(x)
        found[kind] = [y, *torch.autograd.grad(y, [x, *factors], grad)]
    assert {g.dtype for g in found["fused"][2:]} == {torch.bfloat16}
    for plain, ours in zip(found["plain"], found["fused"], strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * plain.abs().max()


# -- what is kept ------------------------------------------------------------------------------------------


@casts
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BASES)
def test_the_input_alone_is_kept_once(name: str, dtype: torch.dtype, dropout: float) -> None:
    layers = nn.ModuleList(fused_layer(BASES[name](dtype), 2, lora_dropout=dropout) for _ in range(3))
    x = torch.randn(50, 64).to(dtype).requires_grad_()

    class All(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [layer(x) for layer in self.layers]  # type: ignore[union-attr]

    every = All()
    every.layers = layers
    (found,) = kept(every, x)
    assert found.data_ptr() == x.data_ptr()


def test_a_frozen_first_factor_keeps_the_thin_product_in_its_place() -> None:
    layer = fused_layer(nn.Linear(64, 24))
    layer.adapter_tensors("a0")["lora_A.weight"].requires_grad_(False)
    x = torch.randn(50, 64, requires_grad=True)
    (found,) = kept(layer, x)
    assert found.shape == (50, 3)
    layer(x).sum().backward()
    B = layer.adapter_tensors("a0")["lora_B.weight"]
    _, ((_, expected),) = ref.linear_gradients(
        ref.array(x), ref.array(layer.base_layer.weight), branches(layer), np.ones((50, 24))
    )
    assert B.grad is not None
    assert np.abs(ref.array(B.grad) - expected).max() < 1e-4


@pytest.mark.parametrize(("wanted", "times"), [(True, 2), (False, 1)])
def test_the_weight_is_dequantized_once_each_way_and_not_for_nothing(
    wanted: bool, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = fused_layer(BASES["4-bit"](torch.float32))
    count = []
    whole = type(layer.codec).multiplier
    monkeypatch.setattr(type(layer.codec), "multiplier", lambda *given: count.append(1) or whole(*given))
    layer(torch.randn(5, 64, requires_grad=wanted)).sum().backward()
    assert len(count) == times


# -- whoever looks into the parts --------------------------------------------------------------------------


def test_hooks_on_the_base_run() -> None:
    layer = fused_layer(nn.Linear(64, 24))
    calls = []
    handle = layer.base_layer.register_forward_hook(lambda *given: calls.append("forward"))
    backward = layer.base_layer.register_full_backward_hook(lambda *given: calls.append("backward"))
    layer(torch.randn(3, 64, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    backward.remove()
    x = torch.randn(3, 64)
    assert why_plain(layer, x, ["a0"]) is None
    factor = layer.lora_A["a0"].register_forward_hook(lambda *given: calls.append("A"))
    layer(x)
    assert calls[2:] == ["A"]
    factor.remove()


def test_a_trained_base_gets_its_gradient() -> None:
    layer = fused_layer(nn.Linear(64, 24))
    layer.base_layer.weight.requires_grad_()
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.base_layer.weight.grad is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_masks(reentrant: bool) -> None:
    layer = fused_layer(nn.Linear(64, 24), 2, lora_dropout=0.3)
    x = torch.randn(5, 64, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(7)
        y = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
        y.square().sum().backward()
        found.append([t.grad.clone() for t in (x, *layer.adapter_tensors("a1").values())])
        layer.zero_grad()
        x.grad = None
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, once)


def test_gradients_of_gradients_are_refused_and_plain_has_them() -> None:
    layer = fused_layer(nn.Linear(8, 4))
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(AdapterError, match=r"create_graph=True.*set_branch\('plain'\)"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with qlora_kit.set_branch("plain"):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    grad.sum().backward()
    assert x.grad is not None


def test_functorch_computes_the_plain_form() -> None:
    layer = fused_layer(nn.Linear(8, 4))
    x = torch.randn(6, 3, 8)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracing does it
@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("name", ["dense", "conv1d", "4-bit", "8-bit", "packed", "packed, 8-bit scales"])
def test_compiled_without_a_break(name: str, kind: str) -> None:
    layer = fused_layer(packed(double_quant=True) if "scales" in name else BASES[name](torch.float32))
    x, outcomes = torch.randn(5, 64, requires_grad=True), []
    torch._dynamo.reset()
    with qlora_kit.set_branch(kind):
        for called in (torch.compile(layer, fullgraph=True, backend="aot_eager"), layer):
            x.grad = None
            layer.zero_grad()
            (y := called(x)).square().sum().backward()
            outcomes.append([y, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)])
    assert len(outcomes[0]) == 4
    torch.testing.assert_close(*outcomes)


# -- the choice --------------------------------------------------------------------------------------------


def test_the_choice_ends_with_its_block_and_is_checked() -> None:
    from qlora_kit.layers import chosen_branch

    before = chosen_branch()
    with qlora_kit.set_branch("plain"):
        assert chosen_branch() == "plain"
    assert chosen_branch() == before
    with pytest.raises(ConfigError, match=r"expected one of .*'fusd'; did you mean 'fused'"):
        qlora_kit.set_branch("fusd")
    assert chosen_branch() == before


def test_a_parameter_changed_before_the_backward_is_noticed() -> None:
    layer = fused_layer(nn.Linear(8, 4))
    y = layer(torch.randn(3, 8))
    with torch.no_grad():
        layer.adapter_tensors("a0")["lora_B.weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
