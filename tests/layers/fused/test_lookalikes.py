"""Blocks that give what a form gives only where it is tried: they compute as their type does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kit
from qlora_kit import LoraConfig, apply_lora
from qlora_kit.layers.fused import blocks


class Block(nn.Module):
    """down(act(up(x))), and then what ``after`` makes of it."""

    def __init__(self, activation: nn.Module, after: Callable[[Any, Tensor], Tensor] = lambda _, y: y) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 12), nn.Linear(12, 8), activation
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self, self.down(self.act(self.up(x))))


class Counting(nn.ReLU):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def dropped(block: Any, y: Tensor) -> Tensor:
    return F.dropout(y, 0.5, block.training)


def scaled(block: Any, y: Tensor) -> Tensor:
    return y * block.scale


def configured(block: Any, y: Tensor) -> Tensor:
    return y * block.config.scale


def with_scale(value: Any) -> Block:
    block = Block(nn.ReLU(), scaled)
    block.scale = value
    return block


def with_module() -> Block:
    """One that isn't among its children."""
    block = Block(nn.ReLU(), lambda block, y: block.held[0](y))
    block.held = [nn.Dropout(0.0)]
    return block


def with_config(scale: float) -> Block:
    block = Block(nn.ReLU(), configured)
    block.config = SimpleNamespace(scale=scale)
    return block


def with_tuple(scale: float) -> Block:
    block = Block(nn.ReLU(), lambda block, y: y * block.scale[0])
    block.scale = (scale,)
    return block


def adapted(*made: nn.Module) -> nn.Module:
    """With adapters that were put on in eval mode, as models are loaded."""
    torch.manual_seed(0)
    model = nn.Sequential(*made).eval()
    apply_lora(model, LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    return model.train()


def fitted(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if getattr(vars(m).get("forward"), "func", None) is blocks._forward]


def check(model: nn.Module) -> None:
    """The output and all gradients are those of the plain form."""
    found = []
    for kind in ("plain", "fused"):
        torch.manual_seed(1)
        x = torch.randn(5, 8, requires_grad=True)
        model.zero_grad()
        with qlora_kit.set_branch(kind):
            y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for expected, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_what_these_tests_vary_is_a_block() -> None:
    model = adapted(Block(nn.ReLU()))
    assert len(fitted(model)) == 1
    check(model)


@pytest.mark.parametrize(
    "block",
    [
        Block(nn.Dropout(0.5)),
        Block(nn.RReLU()),
        Block(nn.ReLU(), dropped),
        Block(nn.ReLU(inplace=True)),
        Block(nn.SiLU(inplace=True)),
        Block(Counting()),
        with_scale(nn.Parameter(torch.ones(()))),
        with_scale(torch.ones(())),
        with_module(),
    ],
    ids=["dropout", "rrelu", "functional dropout", "relu_", "silu_", "counting", "parameter", "tensor", "module"],
)
def test_left_as_it_is(block: Block) -> None:
    model = adapted(block)
    assert not fitted(model)
    check(model)


def test_trying_draws_no_random_numbers_of_the_callers() -> None:
    block = Block(nn.Dropout(0.5))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    assert not blocks._computes_by(block, blocks.Form(("up",), "down", "act", "ungated"))
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("made", [with_scale, with_config, with_tuple], ids=["number", "configuration", "tuple"])
def test_settings_that_differ_are_tried_by_themselves(made: Callable[[float], Block]) -> None:
    one, two = made(1.0), made(3.0)
    model = adapted(one, two)
    assert fitted(model) == [one]
    check(model)


def _idle(block: Block) -> None:
    block.add_module("idle", nn.Dropout(0.0))
    block.after = lambda block, y: block.idle(y)


@pytest.mark.parametrize("change", ["setting", "activation", "activation's setting", "dropout"])
def test_settings_that_are_changed_later(change: str) -> None:
    block = with_scale(1.0)
    block.act = nn.Softplus(beta=1.0)
    if change == "dropout":
        _idle(block)
    model = adapted(block)
    assert fitted(model) == [block]
    check(model)
    if change == "setting":
        block.scale = 2.0
    elif change == "activation":
        block.act = nn.Dropout(0.5)
    elif change == "dropout":
        block.idle.p = 0.5
    else:
        block.act.beta = 2.0
    check(model)


def test_a_replica_computes_as_the_type_does() -> None:
    block = fitted(adapted(Block(nn.ReLU())))[0]
    replica: Any = block._replicate_for_data_parallel()
    assert not {"forward", "_replicate_for_data_parallel"} & set(vars(replica))
    for child in ("up", "down"):  # as torch.nn.parallel.replicate does, in another place
        replica._modules[child] = nn.Linear(*((8, 12) if child == "up" else (12, 8)))
    x = torch.randn(3, 8)
    assert torch.equal(replica(x), replica.down(torch.relu(replica.up(x))))


def test_a_forward_that_others_kept_goes_on_without_adapters() -> None:
    """accelerate's hooks hold the forward that they were put around, and outlive adapters."""
    block = Block(nn.ReLU())
    model: Any = nn.Sequential(block)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["up", "down"]))
    kept = vars(block)["forward"]
    model = lora.unload().train()
    assert not {"forward", "_replicate_for_data_parallel"} & set(vars(block))
    x = torch.randn(3, 8)
    assert torch.equal(kept(x), block(x))


def test_under_autocast_it_is_made_again_as_it_was() -> None:
    class Widening(nn.Module):
        """As torch's own pow does on CUDA."""

        def forward(self, x: Tensor) -> Tensor:
            return (x.float() if torch.is_autocast_enabled("cpu") else x).sigmoid()

    model = adapted(Block(Widening()))
    assert len(fitted(model)) == 1
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(5, 8))
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
