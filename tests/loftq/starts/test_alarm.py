"""A start that may have ruined the model says so: in memory, in the report's file, and in the last line of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import tiny_llama
from tiny_lm import write_tiny_lm
from typer.testing import CliRunner

from loftq import start_report
from loftq.cli import app
from loftq.starts.alarm import FITTED, OUTPUT, SEQUENTIAL, WEIGHT
from loftq.starts.report import LayerReport, Report
from qlora_kit import LoftQConfig, LoraConfig, apply_lora


def report(method: str, *errors: Any) -> Report:
    """Layers of 32 inputs with errors of weights, of outputs, and, if given, the tokens that those are of."""
    rows = []
    for number, (weight, output, *tokens) in enumerate(errors):
        known: dict[str, Any] = {"output_error": output, "zero_output_error": output}
        if tokens:
            known |= {"tokens": tokens[0], "in_features": 32}
        rows.append(LayerReport(f"l{number}", "nf4", 4.5, 16, weight, weight, weight, 1, **known))
    return Report("model", {"method": method}, rows)


@pytest.mark.parametrize(
    ("method", "errors", "fix"),
    [
        ("loftq", [(WEIGHT - 0.01, None)] * 3, None),
        ("loftq", [(WEIGHT + 0.01, None)] * 3, "a text to look at the inputs with"),
        # One bad layer among many good ones is borne, whatever it is.
        ("loftq", [(0.5, None), *[(0.01, None)] * 30], None),
        ("qera", [(0.5, OUTPUT - 0.01)] * 3, None),
        ("qera", [(0.05, OUTPUT + 0.01)] * 3, "method 'aligned'"),
        ("aligned", [(0.5, SEQUENTIAL - 0.01)] * 3, None),
        ("aligned", [(0.05, SEQUENTIAL + 0.01)] * 3, "more bits, a higher rank"),
        # On little text more is left than was measured.
        ("aligned", [(0.05, FITTED + 0.01, 99)], "more text: these are of 3.1 tokens for each input of a layer"),
        ("qera", [(0.05, OUTPUT + 0.01, 99)], "more text: these are of 3.1 tokens for each input of a layer"),
        ("aligned", [(0.05, FITTED + 0.01, 128)], None),
        ("aligned", [(0.05, FITTED - 0.01, 99)], None),
        # Of a layer that no text reached nothing is known.
        ("aligned", [(0.5, None), (0.5, 0.1)], None),
        ("of_ones_own", [(0.05, OUTPUT + 0.01)], "method 'aligned'"),
    ],
)
def test_the_root_mean_square_of_what_is_known_tells(method: str, errors: Any, fix: str | None, tmp_path: Path) -> None:
    found = report(method, *errors)
    last = str(found).splitlines()[-1]
    if fix is None:
        assert found.alarm == ""
        assert "WARNING" not in str(found)
    else:
        assert found.alarm == last
        assert last.startswith("WARNING: the layers' ")
        assert fix in last
    found.save(tmp_path)
    assert Report.load(tmp_path).alarm == found.alarm


def test_in_memory() -> None:
    alarms = {}
    for bits in (2, 8):
        loftq = LoftQConfig(loftq_bits=bits, method="loftq")
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq)
        alarms[bits] = start_report(apply_lora(tiny_llama(), config)).alarm
    assert "weights are off by 0.2" in alarms[2]
    assert alarms[8] == ""


@pytest.mark.parametrize(("bits", "loud"), [(2, True), (8, False)])
def test_the_last_line_of_a_run(bits: int, loud: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)
    model = write_tiny_lm(tmp_path / "lm")
    run = ["init", "--model", str(model), "--out", str(tmp_path / "out"), "--rank", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, [*run, "--bits", str(bits), "--method", "loftq"])
    assert done.exit_code == 0, done.output
    assert ("WARNING: the layers' weights are off by" in done.output.splitlines()[-1]) is loud
