"""What the ranks do in the tests of layers that are shared out, in every form of inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from sharded_nets import LINEARS, PLANS, adapted, apart, loss_of, net, sharded, steps, told, words

from qlora_kit import set_branch
from qlora_kit.layers import AdapterLayer, sharding_of
from qlora_kit.training.preparation.quantize import quantize_


def _layers(model: Any) -> dict[str, AdapterLayer]:
    return {path.removeprefix("model."): m for path, m in model.named_modules() if isinstance(m, AdapterLayer)}


def everything() -> dict[str, Any]:
    """All that is asked of the plans, in one start of the processes."""
    with set_branch("plain"):
        plain = every_plan(0.3, ["sequence"])
    return {
        "trained": every_plan(0.3, list(PLANS)),
        "plain": plain,
        "traffic": traffic(),
        "in eval": in_eval(),
        "shardings": shardings(),
    }


def every_plan(dropout: float, plans: list[str]) -> dict[str, Any]:
    """Of each plan: how far it is from one process, dense and in 4 bits, and what its layers are."""
    found: dict[str, Any] = {}
    given = words()
    for bits in (None, 4):
        targets = ["table", "head", *LINEARS] if bits is None else LINEARS
        one = net() if bits is None else quantize_(net(), bits, blocksize=32, target_modules=LINEARS)
        expected = steps(adapted(one, targets, lora_dropout=dropout).train(), lambda m: loss_of(m, given), 3)
        for plan in plans:
            model = sharded(net(), plan)
            if bits is not None:
                quantize_(model, bits, blocksize=32, target_modules=LINEARS)
            lora = adapted(model, targets, lora_dropout=dropout).train()
            layers = _layers(lora)
            found[f"{plan}, {bits} bits"] = {
                **apart(expected, steps(lora, lambda m: loss_of(m, given), 3)),
                "families": {path: type(layer).__name__ for path, layer in layers.items()},
                "parts": {path: layer.codec.shape(layer.base_layer) for path, layer in layers.items()},
            }
    return found


def traffic() -> dict[str, Any]:
    """What a forward and a backward pass of each plan tell beside what the base does."""
    found = {}
    for plan in PLANS:
        lora = adapted(sharded(net(), plan), LINEARS).train()
        with told() as forward:
            loss = loss_of(lora, words())
        with told() as backward:
            loss.backward()
        found[plan] = forward, backward
    return found


def in_eval() -> dict[str, Any]:
    """How far logits are from those of one process, without gradients."""
    given, found = words(), {}
    for plan in PLANS:
        one, two = adapted(net(), LINEARS).eval(), adapted(sharded(net(), plan), LINEARS).eval()
        with torch.no_grad():
            found[plan] = float((_whole(one(given)) - _whole(two(given))).abs().max())
    return found


def _whole(logits: Any) -> Any:
    return logits.full_tensor() if hasattr(logits, "full_tensor") else logits


def shardings() -> dict[str, Any]:
    """How the layers of each plan are said to be shared out."""
    return {
        plan: {
            path: (how.kind, how.shape, how.takes, how.gives)
            for path, module in sharded(net(), plan).named_modules()
            if (how := sharding_of(module)) is not None
        }
        for plan in PLANS
    }


def of_dense(plan: str) -> dict[str, float]:
    """How far training of one plan is from one process, dense."""
    given, targets = words(), ["table", "head", *LINEARS]
    models = adapted(net(), targets).train(), adapted(sharded(net(), plan), targets).train()
    one, other = (steps(model, lambda m: loss_of(m, given), 3) for model in models)
    return apart(one, other)
