"""A deep model's step from two shallow ones is the deep one's, to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
from folders import config_folder

from qlora_kit.training.planner.depth import extended, peak_of, stack_of
from qlora_kit.training.planner.empty import make_empty
from qlora_kit.training.planner.settings import Settings
from qlora_kit.training.planner.step import trace_step

# Layers all alike, of two kinds by turns, after one of another kind, with experts, beside an encoder.
MODELS = [("llama", 1), ("gemma2", 2), ("deepseek-v3", 1), ("mixtral", 1), ("t5", 1), ("gpt2", 1)]
CASES = [
    *((name, period, True, None) for name, period in MODELS),
    ("llama", 1, False, None),
    ("gemma2", 2, True, "nf4"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "period", "checkpointing", "merge_aware"), CASES)
def test_it_is_what_the_whole_model_holds(
    name: str, period: int, checkpointing: bool, merge_aware: str | None, tmp_path: Path
) -> None:
    settings = Settings(seq=40, batch=2, rank=4, checkpointing=checkpointing, merge_aware=merge_aware)
    empty = make_empty(config_folder(tmp_path, name, layers=8), settings)
    stack = stack_of(empty.model.model)
    assert stack is not None
    assert stack.period == period
    assert stack.left > 1
    with stack.cut(0):
        short = trace_step(empty, settings)
    with stack.cut(1):
        longer = trace_step(empty, settings)
    whole = trace_step(empty, settings)
    assert len(short.moments) < len(longer.moments) < len(whole.moments)
    assert extended(short, longer, stack.left) == peak_of(whole)


@pytest.mark.slow
def test_what_is_not_alike_is_not_concluded_from(tmp_path: Path) -> None:
    settings = Settings(seq=40, batch=2, rank=4)
    empty = make_empty(config_folder(tmp_path, "llama", layers=4), settings)
    short = trace_step(empty, settings)
    assert extended(short, trace_step(empty, settings.but(seq=41)), 3) is None
    assert stack_of(make_empty(config_folder(tmp_path, "llama", layers=2), settings).model.model) is None
