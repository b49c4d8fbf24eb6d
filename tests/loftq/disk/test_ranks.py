"""``loftq init`` on several processes: the same bytes as by one, whatever the method, and an end on every one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs_of_ranks as jobs
import pytest
import torch
from disk_models import contents, write
from processes import in_processes
from tiny_llama import llama

from loftq.disk.stream import stream
from loftq.disk.task import WORK_FOLDER
from loftq.starts.report import Report

pytestmark = pytest.mark.slow
NAMES = list(jobs.tasks(Path(), Path()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def by_two(folder: Path) -> list[Any]:
    """What two ranks return of all tasks; the outputs lie in ``two``."""
    write(llama(), folder / "source", max_shard_size="60KB")
    return in_processes(jobs.by_all, source=folder / "source", out=folder / "two")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bytes_as_one_process(
    name: str, by_two: list[Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Report, "plot", lambda *_: None)
    task = jobs.tasks(folder / "source", folder / "one")[name]
    report = stream(task)
    assert contents(folder / "two" / name) == contents(task.out)
    expected = jobs.rows_of(report)
    assert all(rank[name]["rows"] == expected for rank in by_two), "the report, apart from its times"
    assert sorted(path.name for path in (folder / "two" / name / WORK_FOLDER).iterdir()) == ["journal.jsonl", "lock"]


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_started_by_one_of_them(name: str, by_two: list[Any]) -> None:
    first, second = (rank[name]["started"] for rank in by_two)
    assert sorted(first + second) == sorted(row["path"] for row in by_two[0][name]["rows"])


@pytest.mark.parametrize("name", jobs.AT_ONCE)
def test_both_have_a_share(name: str, by_two: list[Any]) -> None:
    assert all(rank[name]["started"] for rank in by_two)


def test_a_finished_run_is_read_by_all(by_two: list[Any]) -> None:
    assert by_two[0]["again"] == by_two[1]["again"] == by_two[0]["qera"]["rows"]


@pytest.fixture(scope="module")
def seen() -> list[Any]:
    return in_processes(jobs.seen_by_all)


@pytest.mark.parametrize("name", jobs.MODELS)
@pytest.mark.parametrize("sequential", [False, True])
def test_moments_are_those_of_one_process_bit_for_bit(name: str, sequential: bool, seen: list[Any]) -> None:
    expected = jobs.seen_of(jobs.MODELS[name], sequential=sequential)
    assert len(expected) > 3
    for rank in seen:
        assert_same(rank[name, sequential], expected)


@pytest.mark.parametrize("name", jobs.MODELS)
def test_so_they_are_of_all_modules_at_once(name: str, seen: list[Any]) -> None:
    expected = jobs.seen_at_once(jobs.MODELS[name])
    for rank in seen:
        assert_same(rank[name, "at once"], expected)


def test_moments_of_one_batch_for_two_processes(seen: list[Any]) -> None:
    expected = jobs.seen_of(jobs.MODELS["llama"], count=1, sequential=True)
    for rank in seen:
        assert_same(rank["one batch"], expected)


@pytest.mark.parametrize(("sequential", "matrices"), [(False, 1), (True, 4)])
def test_what_goes_from_one_to_the_next(sequential: bool, matrices: int, seen: list[Any]) -> None:
    """A float32 matrix of inputs by inputs for each distinct input, or four where the quantized model is seen too, two
    of outputs by inputs where these are added to a stream, and the tokens' frequencies: after each of the three batches
    to the next, and in the end to all."""
    expected = 0
    streams = 0
    for path, (moments, *_, shortfall) in seen[0]["llama", sequential].items():
        if shortfall is not None:
            streams += 1
            expected += 3 * 2 * shortfall.nbytes
        if path.rpartition(".")[2] not in ("k_proj", "v_proj", "up_proj"):  # they share their input
            expected += 3 * moments.nbytes * (matrices if moments.dim() == 2 else 1)
    assert streams == (4 if sequential else 0)
    assert sum(rank["llama", sequential, "sent"] for rank in seen) == expected


def assert_same(found: Any, expected: Any) -> None:
    """Bit for bit, through dictionaries and tuples."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
