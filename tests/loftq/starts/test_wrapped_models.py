"""Starts of models with wrappers inside: bit for bit those of the model without."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from calibrated_runs import rows
from tiny_llama import llama
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from loftq import allocate
from qlora_kit import LoftQConfig, LoraConfig, apply_lora


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrapped(wrap: Any, where: str) -> Any:
    model: Any = llama()
    if where == "blocks":
        model.model.layers = nn.ModuleList(wrap(block) for block in model.model.layers)
    elif where == "leaf":
        mlp = model.model.layers[0].mlp
        mlp.down_proj = wrap(mlp.down_proj)
    return wrap(model) if where == "whole" else model


def config(method: str) -> LoraConfig:
    loftq = LoftQConfig(method=method, calibration=rows())
    targets = ["q_proj", "down_proj"]
    return LoraConfig(r=4, target_modules=targets, init_lora_weights="loftq", loftq_config=loftq)


def factors(model: nn.Module, method: str) -> dict[str, list[Tensor]]:
    layers = apply_lora(model, config(method)).adapter_layers()
    return {path: [factor.detach() for factor in layer.factors("default")] for path, layer in layers.items()}


@cache
def expected(method: str) -> dict[str, list[Tensor]]:
    return factors(llama(), method)


@pytest.mark.parametrize("method", ["qera", "aligned"])
@pytest.mark.parametrize("where", ["blocks", "leaf", "whole"])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled])
@pytest.mark.slow
def test_a_start_sees_through_wrappers(wrap: Any, where: str, method: str) -> None:
    """Compiled code doesn't look for hooks that come after it: "aligned" changes a module's output by one."""
    found = factors(wrapped(wrap, where), method)
    assert found.keys() == expected(method).keys()
    for path, own in expected(method).items():
        assert all(torch.equal(*pair) for pair in zip(found[path], own, strict=True)), path


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled])
def test_bits_are_chosen_through_wrappers(wrap: Any) -> None:
    plain = allocate(llama(), config("qera"), bits=3)
    assert allocate(wrapped(wrap, "blocks"), config("qera"), bits=3).choices == plain.choices
