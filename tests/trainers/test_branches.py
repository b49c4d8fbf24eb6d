"""Stock trainers in mixed precision with activation checkpointing take the same steps in every form of the branch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from checkpointing import ARGUMENT
from tiny_llama import STORAGES
from tiny_lm import write_tiny_lm
from torch import Tensor
from training_runs import Run, config, finished, load_storage, sft_trainer, trained, wrapped

import qlora_kit
from qlora_kit.layers import linear

SETTINGS: dict[str, Any] = {"bf16": True, ARGUMENT: True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


def moved(adapters: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    return sum(float((tensor - start[key]).square().sum()) for key, tensor in adapters.items()) ** 0.5


def run(kind: str, trainer: str, storage: str, lm: Path, out: Path, seen: list[str | None], **settings: Any) -> Run:
    """Six steps. Without dropout, whose masks the forms draw each in its own way."""
    seen.clear()
    with qlora_kit.set_branch(kind):
        lora = wrapped(load_storage(lm, storage), config(init_lora_weights=False, lora_dropout=0.0))
        if trainer == "Trainer":
            return trained(lora, out, **SETTINGS, **settings)
        return finished(sft_trainer(lora, lm, out, **SETTINGS, **settings), None)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("trainer", ["Trainer", "SFTTrainer"])
@pytest.mark.slow
def test_losses_are_those_of_the_plain_form(
    trainer: str, storage: str, lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    asked = linear.why_plain

    def noted(*arguments: Any) -> str | None:
        seen.append(asked(*arguments))
        return seen[-1]

    monkeypatch.setattr(linear, "why_plain", noted)
    start = run("plain", trainer, storage, lm, tmp_path, seen, max_steps=1, learning_rate=0.0).adapters
    plain = run("plain", trainer, storage, lm, tmp_path, seen)
    assert set(seen) == {"it was chosen"}
    for kind in ("fused", "auto"):
        found = run(kind, trainer, storage, lm, tmp_path, seen)
        assert set(seen) == {None}
        assert found.losses[0] == pytest.approx(plain.losses[0], rel=2e-4)
        # bfloat16 keeps 8 bits, Adam's first steps follow signs, and int8 rounds what differs by that to other codes.
        assert found.losses == pytest.approx(plain.losses, rel=6e-3)
        assert moved(found.adapters, plain.adapters) < 0.3 * moved(plain.adapters, start)
