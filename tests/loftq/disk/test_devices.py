"""Which device a layer is worked on: this machine has as many as it is told to."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from disk_models import config, contents, write
from tiny_llama import llama

import loftq.disk.replacements as replacements
from loftq.disk.devices import Devices, devices_for
from loftq.disk.stream import stream
from loftq.disk.task import Task
from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.errors import ConfigError


class Second(Team):
    """The second of two processes, by name alone."""

    rank, size = 1, 2


@pytest.mark.parametrize(
    ("name", "gpus", "alone", "in_team"),
    [
        ("auto", 0, ("cpu",), ("cpu",)),
        ("auto", 1, ("cuda:0",), ("cuda:0",)),
        ("auto", 4, ("cuda:0", "cuda:1", "cuda:2", "cuda:3"), ("cuda:1",)),
        ("cuda", 4, ("cuda",), ("cuda:1",)),
        ("cuda:2", 4, ("cuda:2",), ("cuda:2",)),
        ("cpu", 4, ("cpu",), ("cpu",)),
    ],
)
def test_devices(name: str, gpus: int, alone: tuple[str, ...], in_team: tuple[str, ...]) -> None:
    assert devices_for(name, ALONE, gpus=gpus, environment={}) == alone
    assert devices_for(name, Second(), gpus=gpus, environment={"LOCAL_RANK": "1"}) == in_team


def test_processes_share_out_the_gpus_of_their_own_machine() -> None:
    assert devices_for("auto", Second(), gpus=2, environment={"LOCAL_RANK": "5"}) == ("cuda:1",)
    assert devices_for("auto", Second(), gpus=2, environment={}) == ("cuda:1",)


def test_each_device_is_lent_to_one_at_a_time() -> None:
    devices = Devices(Task(Path(), Path(), config(), devices=("one", "other")))
    with devices.one() as first, devices.one() as second:
        assert {first, second} == {"one", "other"}
        waiting = threading.Event()
        thread = threading.Thread(target=lambda: (waiting.set(), devices.one().__enter__()))
        thread.start()
        waiting.wait()
        thread.join(0.05)
        assert thread.is_alive(), "there is no third"
    thread.join(5)
    assert not thread.is_alive(), "until one is back"


@pytest.mark.slow
def test_layers_are_spread_over_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are both the CPU: at the same time on both, and the same bytes."""
    source = write(llama(), tmp_path / "source")
    used: list[str] = []
    both = threading.Barrier(2)
    original = replacements.replacement_of

    def meeting(task: Task, checkpoint: Any, unit: Any, *others: Any) -> Any:
        if unit.entry is not None and len(used) < 2:
            used.append(task.device)
            both.wait(30)  # broken if the other never comes
        return original(task, checkpoint, unit, *others)

    task = Task(source, tmp_path / "one", config(2))
    stream(task)
    monkeypatch.setattr(replacements, "replacement_of", meeting)
    stream(replace(task, out=tmp_path / "two", devices=("cpu", "cpu:0")))
    assert sorted(used) == ["cpu", "cpu:0"]
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device: expected"):
        stream(Task(tmp_path, tmp_path / "out", config(), devices=("cpu", "cuda:99")))
