"""States of optimizers, beside those that real ones make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from qlora_kit.training.optimizers import optimizer_class
from qlora_kit.training.planner.optimizers import OPTIMIZERS, is_paged, state_bytes
from qlora_kit.training.planner.settings import Settings

REAL: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": torch.optim.AdamW,
    "adamw-8bit": bnb.optim.AdamW8bit,
    "adamw-32bit": bnb.optim.AdamW32bit,
    "paged-adamw": bnb.optim.AdamW32bit,
    "paged-adamw-8bit": bnb.optim.AdamW8bit,
    "lion": bnb.optim.Lion32bit,
    "lion-8bit": bnb.optim.Lion8bit,
    "paged-lion": bnb.optim.Lion32bit,
    "paged-lion-8bit": bnb.optim.Lion8bit,
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, momentum=0.9),
    "sgd": torch.optim.SGD,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REAL)
def test_bytes_are_those_of_the_real_states(name: str, dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((16, 100), (64, 100), (100, 65))]
    optimizer = REAL[name](parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = {
        tensor.untyped_storage()._cdata: tensor.nbytes
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if isinstance(tensor, Tensor) and tensor.numel() > 1 and not key.startswith("qmap")
    }
    assert state_bytes(name, parameters) == sum(found.values())


def test_adafactor_keeps_a_row_and_a_column() -> None:
    from transformers import Adafactor

    parameters = [nn.Parameter(torch.ones(16, 100)), nn.Parameter(torch.ones(7))]
    optimizer = Adafactor(parameters, lr=1e-3, relative_step=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim()]
    assert state_bytes("adafactor", parameters) == sum(tensor.nbytes for tensor in held)


def test_which_are_paged() -> None:
    paged = ["paged-adamw", "paged-adamw-8bit", "paged-lion", "paged-lion-8bit"]
    assert [name for name in OPTIMIZERS if is_paged(name)] == paged


@pytest.mark.parametrize("name", sorted({*OPTIMIZERS} - {"sgd-momentum"}))
def test_names_are_those_of_the_optimizers(name: str) -> None:
    """As they are spelled here and there, with momentum the only thing that a name of theirs doesn't say."""
    spelled = name.replace("-", "_")
    made = optimizer_class(name)
    assert optimizer_class(spelled) is made
    assert Settings(optimizer=spelled).optimizer == name
    assert made.__name__.startswith("Paged") == is_paged(name)


def test_32_bits_are_told_or_meant() -> None:
    assert Settings(optimizer="paged_adamw_32bit").optimizer == "paged-adamw"
    assert optimizer_class("paged_adamw") is optimizer_class("paged_adamw_32bit") is bnb.optim.PagedAdamW32bit
