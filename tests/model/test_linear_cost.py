"""What an adapter's life costs grows as the number of modules: with twice as many, twice the calls, not four times.

Counted are calls of functions, which say nothing of the machine. Where something is looked up for each module by going
through all, the growth from n to 2n modules isn't that from 2n to 3n.
"""

from __future__ import annotations

import cProfile
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.compat import peft

NAMES = ["gate_proj", "up_proj", "down_proj"]
EXPERTS = (4, 8, 12)


class Experts(nn.Module):
    """``count`` experts of three linears, and a head."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in NAMES}) for _ in range(count)
        )
        self.lm_head = nn.Linear(4, 8)


def paths(count: int) -> list[str]:
    return [f"experts.{index}.{name}" for index in range(count) for name in NAMES]


#: Ways to say which modules, by the number of experts.
CONFIGS: dict[str, Callable[[int], LoraConfig]] = {
    "names": lambda count: LoraConfig(r=2, target_modules=NAMES),
    "all-linear": lambda count: LoraConfig(r=2, target_modules="all-linear"),
    "expression": lambda count: LoraConfig(r=2, target_modules=r".*_proj", modules_to_save=["lm_head"]),
    "each path": lambda count: LoraConfig(
        r=2,
        target_modules=paths(count),
        rank_pattern={path: 1 + place % 3 for place, path in enumerate(paths(count))},
        layers_to_transform=list(range(count)),
    ),
    "merge-aware": lambda count: LoraConfig(r=2, target_modules=NAMES, merge_aware="nf4"),
    "all but one": lambda count: LoraConfig(r=2, target_modules=NAMES, exclude_modules=paths(count)[1:]),
}


def switched(lora: LoraModel) -> None:
    with lora.disable_adapter():
        pass


def calls_in(function: Callable[[], Any], into: list[int]) -> Any:
    profile = cProfile.Profile()
    gc.collect()
    gc.disable()  # what is collected meanwhile, an earlier model say, makes calls of its own
    try:
        result = profile.runcall(function)
    finally:
        gc.enable()
    into.append(sum(entry.callcount for entry in profile.getstats()))
    return result


def life(count: int, config: LoraConfig, folder: Path, calls: dict[str, list[int]]) -> None:
    """A whole life of adapters on ``count`` experts; the calls that each step of it makes go into ``calls``."""

    def step(name: str, function: Callable[[], Any]) -> Any:
        return calls_in(function, calls.setdefault(name, []))

    lora: LoraModel = step("injection", lambda: apply_lora(Experts(count), config))
    step("save", lambda: lora.save_pretrained(folder))
    step("add", lambda: lora.add_adapter("second", config))
    step("load", lambda: lora.load_adapter(folder, "third"))
    step("set", lambda: lora.set_adapter("second"))
    step("switch", lambda: switched(lora))
    step("train", lambda: lora.set_requires_grad("default"))
    step("delete", lambda: lora.delete_adapter("second"))
    step("state", lambda: lora.state_dict())
    step("unload", lambda: lora.unload())
    step("from_pretrained", lambda: LoraModel.from_pretrained(Experts(count), folder))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_calls_grow_as_the_modules_do(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    calls: dict[str, list[int]] = {}
    for place, count in enumerate((EXPERTS[0], *EXPERTS)):  # once more before, for what is looked up and kept
        life(count, CONFIGS[kind](count), tmp_path / str(place), calls)
    check_linear(calls)


def life_by_peft_names(count: int, config: LoraConfig, folder: Path, calls: dict[str, list[int]]) -> None:
    """The same in PEFT's words, with what only these have."""

    def step(name: str, function: Callable[[], Any]) -> Any:
        return calls_in(function, calls.setdefault(name, []))

    model = step("get_peft_model", lambda: peft.get_peft_model(Experts(count), config))
    state = step("state", lambda: peft.get_peft_model_state_dict(model))
    step("set state", lambda: peft.set_peft_model_state_dict(model, state))
    step("status", lambda: (model.get_layer_status(), model.get_model_status()))
    step("combine", lambda: model.add_weighted_adapter(["default"], [0.5], "half"))
    step("merge", lambda: model.merge_adapter())
    step("unmerge", lambda: model.unmerge_adapter())
    model.save_pretrained(folder)
    step("merge and unload", lambda: model.merge_and_unload())
    step("from_pretrained", lambda: peft.PeftModel.from_pretrained(Experts(count), folder))
    step("inject", lambda: peft.inject_adapter_in_model(config, Experts(count)))


@pytest.mark.slow
def test_calls_by_peft_names_grow_as_the_modules_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, calls = peft.LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False), {}
    for place, count in enumerate((EXPERTS[0], *EXPERTS)):
        life_by_peft_names(count, config, tmp_path / str(place), calls)
    check_linear(calls)


def check_linear(calls: dict[str, list[int]]) -> None:
    for name, (_, small, middle, large) in calls.items():
        assert large - middle == pytest.approx(middle - small, rel=0.01, abs=100), (name, small, middle, large)
