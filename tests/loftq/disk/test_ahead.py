"""Units that lie ready before it is their turn: kept, taken over by the next run, and held against what it is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from calibrated_runs import calibrated
from disk_models import config, contents, write
from tiny_llama import llama

import loftq.disk.replacements as replacements
from loftq.disk.ahead import PATTERN, Ahead
from loftq.disk.checkpoint import Checkpoint, StoredTensor
from loftq.disk.replacements import replacement_of
from loftq.disk.stream import stream
from loftq.disk.task import WORK_FOLDER, Task
from loftq.starts.report import Report
from qlora_kit import LoraConfig
from qlora_kit.errors import StorageError


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama().bfloat16(), tmp_path_factory.mktemp("source"))


class CutError(Exception):
    """Stands for whatever ends a process."""


def cut_at_once(task: Task, units: list[str]) -> Ahead:
    """A run that has written nothing, and left ``units`` ready, as another process of it would have."""
    checkpoint = Checkpoint(task.source, task.lora)
    ahead = Ahead(task, checkpoint)

    def leaving(*_: object) -> None:
        for unit in checkpoint.units:
            if unit.name in units:
                ahead.put(unit, replacement_of(task, checkpoint, unit, checkpoint.reader.tensor(unit.name)))
        raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loftq.disk.stream.together", leaving)
        with pytest.raises(CutError):
            stream(task)
    assert len(list(ahead.folder.glob(PATTERN))) == len(units)
    return ahead


LAST = "model.layers.1.mlp.down_proj.weight"
FIRST = "model.layers.0.self_attn.q_proj.weight"


def test_the_next_run_takes_them(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, started = Task(source, tmp_path / "out", config(2), shard_bytes=20_000), list[str]()
    ahead = cut_at_once(task, [FIRST, LAST])
    original = replacements.start_of

    def noting(request, *others):
        started.append(request.path)
        return original(request, *others)

    monkeypatch.setattr(replacements, "start_of", noting)
    report = stream(task)
    assert sorted([*started, FIRST.removesuffix(".weight"), LAST.removesuffix(".weight")]) == sorted(
        row.path for row in report.layers
    )
    stream(whole := Task(source, tmp_path / "whole", config(2), shard_bytes=20_000))
    assert contents(task.out) == contents(whole.out)
    assert not list(ahead.folder.glob(PATTERN)), "they are where they belong"


def test_what_comes_back_is_what_was_put(source: Path, tmp_path: Path) -> None:
    task = Task(source, tmp_path / "out", config(2))
    ahead = cut_at_once(task, [FIRST])
    unit = next(unit for unit in ahead.checkpoint.units if unit.name == FIRST)
    made = replacement_of(task, ahead.checkpoint, unit, ahead.checkpoint.reader.tensor(FIRST))
    found = ahead.take(unit)
    for part in ("base", "adapter"):
        expected = getattr(made, part)
        assert getattr(found, part).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in getattr(found, part).items())
    assert found.digest == made.digest
    assert made.row is not None
    assert found.row is not None
    assert {**vars(found.row), "seconds": 0} == {**vars(made.row), "seconds": 0}


@pytest.mark.slow
def test_the_change_of_one_is_that_of_its_start(source: Path, tmp_path: Path) -> None:
    """Later modules see it: bit for bit, so that it matters to none who has made it."""
    lora = calibrated("aligned")
    task = Task(source, tmp_path / "out", lora)
    changes: dict[str, torch.Tensor] = {}
    original = replacements.replacement_of

    def noting(task: Task, checkpoint: Checkpoint, unit: StoredTensor, *others: object) -> object:
        made = original(task, checkpoint, unit, *others)  # type: ignore[arg-type]
        if made.change is not None:
            ahead = Ahead(task, checkpoint)
            ahead.put(unit, made)
            changes[unit.name] = made.change
            assert torch.equal(ahead.change(unit), made.change), unit.name
            ahead.drop(unit)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replacements, "replacement_of", noting)
        stream(task)
    assert len(changes) == 14


def test_one_that_was_changed_since_is_refused(source: Path, tmp_path: Path) -> None:
    task = Task(source, tmp_path / "out", config(2))
    ahead = cut_at_once(task, [FIRST])
    file = next(ahead.folder.glob(PATTERN))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"unit-\d+.*as an earlier run wrote it, found it changed since"):
        stream(task)
    file.write_bytes(b"12345678" + bytes(100))
    with pytest.raises(StorageError, match=r"unit-\d+.*expected what an earlier run made of"):
        stream(task)


@pytest.mark.parametrize("other", [config(3), config(2, alpha=8)])
def test_those_of_another_command_are_refused(source: Path, tmp_path: Path, other: LoraConfig) -> None:
    task = Task(source, tmp_path / "out", config(2))
    ahead = cut_at_once(task, [FIRST])
    with pytest.raises(StorageError, match="expected the command that was begun here, found another"):
        stream(Task(source, tmp_path / "out", other))
    assert ahead.has(next(unit for unit in ahead.checkpoint.units if unit.name == FIRST))


def test_a_file_that_was_being_made_is_none(source: Path, tmp_path: Path) -> None:
    task = Task(source, tmp_path / "out", config(2))
    ahead = cut_at_once(task, [FIRST])
    (ahead.folder / "unit-00001.safetensors.making").write_bytes(b"half")
    stream(task)
    assert sorted(path.name for path in (task.out / WORK_FOLDER).iterdir()) == ["journal.jsonl", "lock"]
