"""Processes that share work: values and sums that go around, and nobody who waits for one that is gone."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jobs_of_team as jobs
import pytest
import torch
from processes import in_processes

from qlora_kit.distributed.joining import joined
from qlora_kit.distributed.team import ALONE, Processes
from qlora_kit.errors import ProcessesError

SIZE = 2


@pytest.fixture(scope="module")
def around() -> list[dict[str, Any]]:
    return in_processes(jobs.values_go_around, size=SIZE)


@pytest.mark.slow
def test_a_value_of_one_is_all_s(around: list[dict[str, Any]]) -> None:
    for found in around:
        value = found["from 1"]
        assert torch.equal(value["a"], torch.arange(4.0).bfloat16())
        assert value["b"][1].shape == (2, 0)
        assert value["c"] == "text"
        assert found["one tensor"], "what is one tensor there is one here"
        assert found["gathered"] == ["of 0", "of 1"]


@pytest.mark.slow
def test_sums_are_in_order(around: list[dict[str, Any]]) -> None:
    assert [found["numbers"] for found in around] == [[0, 2, 4], [1, 3]]
    for found in around:
        parts, tensor = found["sum"]
        assert parts == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
        assert torch.equal(tensor, torch.full((3,), 5.0).bfloat16())
        assert found["no sum"] == []
        assert found["sum of one"] == [0]


@pytest.mark.slow
def test_each_item_is_worked_on_once_and_comes_in_order(around: list[dict[str, Any]]) -> None:
    first, second = (found["shared"] for found in around)
    assert [(item, read) for item, (read, _) in first] == [(item, str(item)) for item in range(9)]
    assert {rank for _, (_, rank) in first} <= set(range(SIZE))
    assert second == [], "the one that leads has them"


@pytest.mark.slow
def test_nobody_waits_for_one_that_is_lost(tmp_path: Path) -> None:
    first, second = in_processes(jobs.one_is_lost, size=SIZE, folder=str(tmp_path))
    assert first["failed"] == "ProcessesError: process 1 of 2: OSError: rank one's own words; go on so"
    assert second["failed"] == "OSError: rank one's own words"
    assert first["gone"] == "process 1 of 2: expected a sign of it, found none for 2 s"
    assert first["spokesman"]


def test_to_wait_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    """torch's store says so on the terminal whenever a wait for a value runs out, twice a second for as long as another
    computes."""
    import torch.distributed as dist

    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    team = Processes(lambda: dist.TCPStore("localhost", store.port, is_master=False), rank=0, size=2, patience=60)
    try:
        later = threading.Timer(1.2, lambda: store.set("value", "there"))
        later.start()
        assert team._wait("value") == b"there"
        later.join()
    finally:
        team.close()
    assert capfd.readouterr() == ("", "")


def test_a_process_alone_has_no_others_to_wait_for() -> None:
    with joined(environment={}) as team:
        assert team is ALONE
        assert team.leads
        assert list(team.numbers(3)) == [0, 1, 2]
        assert team.from_rank("a") == "a"
        assert team.gathered(1) == [1]
        assert team.summed(3, lambda number: number, jobs.Parts()).parts == [0, 1, 2]
        doubled = team.shared([3, 1, 2], lambda item: item, lambda item, read: 2 * read, size=lambda item: item)
        assert list(doubled) == [(3, 6), (1, 2), (2, 4)]
        team.barrier()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: expected a number .*, found 'two'; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK: expected a number below 2 .*, found ''; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: expected a number below 2 .*, found '2'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT: expected a number .*, found ''"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29500"}, "MASTER_ADDR: expected the machine of process 0 "),
    ],
)
def test_an_environment_that_says_half(environment: dict[str, str], said: str) -> None:
    """As batch systems and containers leave it."""
    with pytest.raises(ProcessesError, match=said) as error, joined(environment=environment):
        pass
    assert error.value.spokesman
