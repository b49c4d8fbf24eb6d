"""Dropout, checkpointing, autocast and compilation of adapted layers on a GPU, in both forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapted_layers import adapt, assert_near, branches
from modules_on_device import LINEARS, STORED_BY_BITSANDBYTES
from on_device import DEVICE, HALVES, need_dtype
from reference import branches as ref
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qlora_kit
from qlora_kit import AdapterLayer, LoraConfig, LoraModel, apply_lora, codec_for

pytestmark = pytest.mark.cuda
KINDS = ["dense", "nf4", "signed2"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(kind: str, dtype: torch.dtype = torch.bfloat16, **config: Any) -> tuple[LoraModel, AdapterLayer]:
    need_dtype(dtype)
    if kind in STORED_BY_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    lora, layer = adapt(LINEARS[kind](dtype).to(DEVICE), adapters=2, **config)
    return lora.train(), layer


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device=DEVICE, dtype=dtype)


def gradients(layer: nn.Module, x: Tensor, *, checkpointed: bool = False) -> list[Tensor]:
    """The output of ``layer`` and the gradients of its square: the input's and those of all that trains."""
    torch.manual_seed(9)
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
    y.float().square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.requires_grad and p.grad is not None)]


@every_kind
def test_dropout_is_the_same_from_the_same_seed(kind: str, form: str) -> None:
    _, layer = adapted(kind, lora_dropout=0.3)
    x = inputs(50, 64)
    first, again = gradients(layer, x), gradients(layer, x)
    assert len(first) == 6
    for one, two in zip(first, again, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    torch.manual_seed(10)
    assert not torch.equal(layer(x), first[0])
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@every_kind
def test_checkpointing_draws_the_same_dropout(kind: str, form: str) -> None:
    _, layer = adapted(kind, lora_dropout=0.3)
    x = inputs(50, 64)
    plain, checkpointed = gradients(layer, x), gradients(layer, x, checkpointed=True)
    assert len(plain) == 6
    for one, two in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_dropped_inputs_get_no_gradient(form: str) -> None:
    """With the base at zero the gradient is the branch's alone, and zero where its mask is, at the rate asked for."""
    base = nn.Linear(64, 48, bias=False).to(DEVICE)
    with torch.no_grad():
        base.weight.zero_()
    lora, layer = adapt(base, lora_dropout=0.25)
    lora.train()
    _, grad_x, *_ = gradients(layer, inputs(400, 64, dtype=torch.float32))
    assert abs((grad_x == 0).double().mean().item() - 0.25) < 0.015  # over five standard deviations


@pytest.mark.parametrize("dtype", HALVES)
@every_kind
def test_autocast_keeps_float32_gradients(kind: str, dtype: torch.dtype, form: str) -> None:
    """Float32 weights under autocast: the product is in half precision, the factors and their gradients float32; loss
    scaling divides out."""
    need_dtype(dtype)
    _, layer = adapted(kind, torch.float32)
    weight, bias = codec_for(layer.base_layer).read(layer.base_layer), ref.array(layer.base_layer.bias)
    x, grad = inputs(2, 9, 64, dtype=torch.float32), inputs(2, 9, 48, dtype=torch.float32)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.0)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**8, enabled=dtype == torch.float16)
    with torch.autocast(DEVICE, dtype=dtype):
        y = layer(x)
    expected = ref.linear(ref.array(x), ref.array(weight), bias, branches(layer))
    assert_near(y, expected, dtype, "y")
    scaler.scale((y.float() * grad).sum()).backward()
    scaler.unscale_(optimizer)
    _, factors = ref.linear_gradients(ref.array(x), ref.array(weight), branches(layer), ref.array(grad))
    for name, gradients_of in zip(layer.active_adapters, factors, strict=True):
        for parameter, gradient in zip(layer.adapter_tensors(name).values(), gradients_of, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert_near(parameter.grad, gradient, dtype, name)


def test_an_overflow_is_seen_by_loss_scaling(form: str) -> None:
    """Gradients beyond float16 come out infinite or NaN, so that the step is skipped: the factors stay as they are."""
    _, layer = adapted("dense", torch.float32)
    before = [p.detach().clone() for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40)
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = layer(inputs(9, 64, dtype=torch.float32))
    scaler.scale(y.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    for parameter, value in zip([p for p in layer.parameters() if p.requires_grad], before, strict=True):
        assert torch.equal(parameter, value)


class Block(nn.Module):
    """A gated layer, as decoders have it."""

    def __init__(self, make: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.gate, self.down = make(dtype), make(dtype), nn.Linear(48, 64).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")  # of what dynamo does when it traces autograd functions
@every_kind
def test_a_compiled_block_computes_as_it_does_uncompiled(kind: str, form: str) -> None:
    need_dtype(torch.bfloat16)
    if kind in STORED_BY_BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    block = Block(LINEARS[kind], torch.bfloat16).to(DEVICE)
    lora = apply_lora(block, LoraConfig(r=4, target_modules=["up", "gate", "down"], init_lora_weights=False)).train()
    x = inputs(40, 64)
    expected = gradients(lora, x)
    torch._dynamo.reset()
    compiled = torch.compile(lora, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    found = gradients(compiled, x)
    assert len(found) == len(expected) == 8
    for one, two in zip(found, expected, strict=True):
        assert ((one.double() - two.double()).norm() / two.double().norm()).item() < 0.02  # roundings to bfloat16
    torch._dynamo.reset()


def test_forms_agree_to_rounding() -> None:
    """In float32 plain and fused differ by the order of sums only."""
    _, layer = adapted("dense", torch.float32)
    x = inputs(50, 64, dtype=torch.float32)
    with qlora_kit.set_branch("plain"):
        plain = gradients(layer, x)
    with qlora_kit.set_branch("fused"):
        fused = gradients(layer, x)
    for one, two in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
