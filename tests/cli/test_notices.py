"""Warnings and notes on the way: in the command's words, once, and those of others as ever."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
from tiny_llama import llama
from typer.testing import CliRunner

import loftq.inputs.walk
from loftq.cli import app
from qlora_kit.cli.notices import notices_to


@pytest.mark.filterwarnings("default")
def test_each_is_said_once_and_others_are_left_alone() -> None:
    said: list[str] = []
    with warnings.catch_warnings(record=True) as others, notices_to(said.append):
        for line in (1, 2):
            warnings.warn_explicit("few inputs", UserWarning, loftq.inputs.walk.__file__, line)
            # A checkout may have one of our names, and hold others' packages.
            warnings.warn_explicit("deprecated", FutureWarning, "/checkouts/qlora_kit/.venv/torch/nn.py", line)
            logging.getLogger("qlora_kit.somewhere").warning("%d %% survived", 2)
    assert said == ["few inputs", "2 % survived"]
    assert [str(other.message) for other in others] == ["deprecated"] * 2
    shown = warnings.showwarning
    with notices_to(said.append):
        pass
    assert warnings.showwarning is shown
    assert not logging.getLogger("loftq").handlers


@pytest.mark.filterwarnings("default")
def test_a_command_says_them_with_its_options(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    arguments = ["init", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--bits", "2"]
    outcome = CliRunner().invoke(app, [*arguments, "--steps", "1", "--calibration", "none"])
    assert outcome.exit_code == 0, outcome.output
    notes = [line for line in outcome.output.splitlines() if "looks at no inputs" in line]
    assert len(notes) == 1, outcome.output
    assert notes[0].startswith("loftq init: calibration none: a start of 2 or 3 bits")
    assert notes[0].endswith("or name --method loftq to be asked no more")
    assert ".py:" not in notes[0]
