"""Folders that earlier releases left are still read: cut-off runs go on, and finished ones are known as such."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import BASE, JOURNALS, RUNS
from safetensors.torch import load_file
from torch import Tensor

from loftq.disk.verify import verify
from loftq.starts.report import Report
from qlora_kit.checkpoints.journal import Journal

# What holds paths of this run, or times.
NOT_COMPARED = ("loftq_report", "merge_report", "adapter_config")
# A run that was begun on another machine, where sums were added in another order.
OTHER_MACHINE = {"rtol": 1e-3, "atol": 1e-4}
# Runs whose bits are chosen, and whose start is found, by another rule now: what was chosen then stays, and layers that
# were finished stay as they are.
OTHER_RULE = {"init-on-text"}


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)


def files(folder: Path) -> list[Path]:
    """All but those that the run itself works with."""
    return [file for file in sorted(folder.rglob("*.*")) if file.is_file() and file.parent.name[0] != "."]


def tensors(folder: Path) -> dict[str, Tensor]:
    shards = [file for file in files(folder) if file.suffix == ".safetensors"]
    return {name: tensor for file in shards for name, tensor in load_file(file).items()}


def texts(folder: Path) -> dict[str, str]:
    kept = [f for f in files(folder) if f.suffix != ".safetensors" and not f.name.startswith(NOT_COMPARED)]
    return {str(file.relative_to(folder)): file.read_text() for file in kept}


def units(folder: Path) -> int:
    """How many are in the journal as finished."""
    (journal,) = folder.glob(".*/journal.jsonl")
    return journal.read_text().count('{"unit"')


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_cut_off_goes_on(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, count = RUNS[name]
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    run(fresh)
    shutil.copytree(JOURNALS / f"{name}-cut", out)
    assert units(out) == count
    added: list[Any] = []
    add = Journal.add
    monkeypatch.setattr(
        Journal, "add", lambda self, line, *, done=True: (added.append(line), add(self, line, done=done))
    )
    run(out)
    assert len(added) == units(fresh) - count, "what was finished, or measured, isn't done again"
    assert all("unit" in line for line in added)
    then = JOURNALS / f"{name}-finished" if name in OTHER_RULE else fresh
    found, expected = tensors(out), tensors(then)
    assert {key: (t.shape, t.dtype) for key, t in found.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
    if name in OTHER_RULE:
        assert texts(out).keys() == texts(fresh).keys()
        stored = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (out, then)]
        types = [{m: e["quant_type"] for e in each["groups"] for m in e["modules"]} for each in stored]
        assert types[0] == types[1], "what was chosen then"
        return
    assert texts(out) == texts(fresh)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, **(OTHER_MACHINE if tensor.is_floating_point() else {}))


@pytest.mark.parametrize("name", ["merge", "init-on-text"])
def test_a_finished_folder_is_left_alone(name: str, tmp_path: Path) -> None:
    run, _ = RUNS[name]
    out = tmp_path / "out"
    shutil.copytree(JOURNALS / f"{name}-finished", out)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(out)}
    assert len(run(out).layers) == 4
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files(out)} == before


def test_a_finished_start_is_verified_and_shown() -> None:
    out = JOURNALS / "init-on-text-finished"
    belong, adapter, written, loads, *measured = verify(out, BASE)
    assert belong.startswith("4 layers: backbone and adapter belong together")
    assert adapter.startswith("8 adapter tensors: present")
    assert written.endswith("no checksums noted")
    assert "transformers loads it" in loads
    assert len(measured) == 4
    assert "model.layers.1.mlp.down_proj" in str(Report.load(out))
