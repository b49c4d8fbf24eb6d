"""A start and a merge on a really trained language model, where few bits show what they cost.

The model and the text are those of benchmarks/real_models.py, if the ``bench`` extra is installed (CONTRIBUTING). Only
the first four of its 30 blocks are quantized, in which most harm is done, and 1,024 tokens are measured.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from loftq import distill, soft_labels, start_report
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.demo.models import Source, quiet
from qlora_kit.demo.training import perplexity

BLOCKS = range(4)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def real_models() -> ModuleType:
    place = Path(__file__).parents[2] / "benchmarks" / "real_models.py"
    spec = importlib.util.spec_from_file_location("real_models", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


REAL = real_models()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(REAL.missing()), reason=f"{', '.join(REAL.missing())} not installed, see CONTRIBUTING"),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return REAL.folder()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def texts(folder: Path) -> Any:
    return REAL.texts(Source(str(folder), "cpu", torch.float32).tokenizer())


def started(folder: Path, **loftq: Any) -> LoraModel:
    lora = LoraConfig(
        r=16,
        lora_alpha=16,
        target_modules=LINEARS,
        layers_to_transform=list(BLOCKS),
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(**loftq),
    )
    with quiet():
        return apply_lora(Source(str(folder), "cpu", torch.float32).dense(), lora)


def of_test(model: Any, texts: Any) -> float:
    return perplexity(model, texts.test[:4])


def test_texts_are_apart_and_the_same_everywhere(texts: Any) -> None:
    rows: dict[str, Tensor] = {name: rows for name, rows in vars(texts).items()}
    assert {name: tuple(part.shape) for name, part in rows.items()} == {
        "test": (16, 256),
        "calibration": (128, 256),
        "train": (150, 256),
        "other_calibration": (128, 256),
        "other_test": (16, 256),
    }
    pieces = {name: {tuple(piece.tolist()) for piece in part.view(-1, 32)} for name, part in rows.items()}
    for name in ("calibration", "train"):
        assert not pieces["test"] & pieces[name]
    assert texts.test[0, :4].tolist() == [504, 5651, 28482, 8498]  # "The Civil Aviation Safety"


def test_two_bits_need_a_look_at_the_inputs_and_merge_without_loss(folder: Path, texts: Any) -> None:
    with quiet():
        full = of_test(Source(str(folder), "cpu", torch.float32).dense(), texts)
    plain = started(folder, loftq_bits=2, loftq_iter=5, method="loftq")
    published = of_test(plain, texts)
    assert start_report(plain).alarm
    del plain
    lora = started(folder, loftq_bits=2, calibration=texts.calibration[:8])
    found = of_test(lora, texts)
    # The model at 16 bits is at 38.5 on eight rows, published LoftQ at 184, and this at 53.
    assert math.log(published / full) > 1
    assert math.log(found / full) < 0.35 * math.log(published / full)
    merged = of_test(merge(lora, into="bfloat16", force=True).model, texts)
    # bfloat16 keeps 8 bits of each weight.
    assert merged == pytest.approx(found, rel=0.02)


def test_a_start_that_looked_at_nothing_learns_from_the_original(folder: Path, texts: Any) -> None:
    with quiet():
        original = Source(str(folder), "cpu", torch.float32).dense()
    labels = soft_labels(original, texts.train[:10, :128])
    full = of_test(original, texts)
    del original
    lora = started(folder, loftq_bits=2, loftq_iter=5, method="loftq")
    before = of_test(lora, texts)
    found = distill(lora, labels, passes=2, batch_rows=4, learning_rate=1e-3)
    assert found.kept
    assert found.after < 0.8 * found.before
    assert math.log(of_test(lora, texts) / full) < 0.8 * math.log(before / full)
