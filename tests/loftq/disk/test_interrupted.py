"""A run that is cut off anywhere goes on, and ends with the bytes of one that wasn't."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from commands import loftq_here
from disk_models import config, contents, streamed, write
from held import Held
from tiny_llama import llama

from loftq.disk.checkpoint import StoredTensor
from loftq.disk.stream import stream
from loftq.disk.task import WORK_FOLDER, Task
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.errors import StorageError

OPTIONS = {"shard_bytes": 20_000}


class CutError(Exception):
    """Stands for whatever ends a process."""


def cut_after(count: int, source: Path, out: Path) -> None:
    done = 0

    def progress(unit: StoredTensor, weights: int) -> None:
        nonlocal done
        done += 1
        if done == count:
            raise CutError

    with pytest.raises(CutError):
        stream(Task(source, out, config(2), **OPTIONS), progress=progress)


@pytest.fixture(scope="module")
def whole(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    streamed(llama_dir, out, config(2), **OPTIONS)
    return contents(out)


@pytest.mark.parametrize("count", [1, 2, 7, 13, 21])
@pytest.mark.slow
def test_goes_on_after_any_number_of_units(
    count: int, llama_dir: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cut_after(count, llama_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists(), "a folder that was cut off is no model"
    streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_several_cuts(llama_dir: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    for count in (3, 6, 8, 20):
        cut_after(count, llama_dir, tmp_path / "out")
    streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_what_the_journal_doesn_t_know_of_is_cut_away(llama_dir: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    cut_after(9, llama_dir, out)
    work = out / WORK_FOLDER
    with (work / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"unit": "model.la')  # the line that was being written
    for file in (max(work.glob("part-*.safetensors")), work / "adapter_model.safetensors"):
        with file.open("ab") as stream_:
            stream_.write(b"half a tensor")
    streamed(llama_dir, out, config(2), **OPTIONS)
    assert contents(out) == whole


@pytest.mark.parametrize(
    "place",
    [
        "loftq.disk.writers.write_text_atomically",
        "loftq.disk.writers.quantization_config",
        "loftq.disk.writers.place",
        "qlora_kit.checkpoints.growing_model.place",
        "qlora_kit.checkpoints.growing_model.write_text_atomically",
    ],
)
@pytest.mark.slow
def test_a_cut_while_finishing(
    place: str, llama_dir: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*_: object) -> None:
        raise CutError

    with monkeypatch.context() as patched:
        patched.setattr(place, cut)
        with pytest.raises(CutError):
            streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()
    streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_finished_run_is_left_alone(llama_dir: Path, tmp_path: Path) -> None:
    first = streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")}
    again = streamed(llama_dir, tmp_path / "out", config(2), **OPTIONS)
    assert again.to_dict() == first.to_dict()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*.safetensors")} == before


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True])
def test_a_changed_option_is_named(finished: bool, llama_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if finished:
        streamed(llama_dir, out, config(2), **OPTIONS)
    else:
        cut_after(5, llama_dir, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    lora = config(2, loftq_iter=4)
    lora.r = 8
    with pytest.raises(StorageError, match=r"loftq_iter=3 then, loftq_iter=4 now, r=4 then, r=8 now"):
        streamed(llama_dir, out, lora, **OPTIONS)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_changed_source_is_named(tmp_path: Path) -> None:
    source = write(llama(), tmp_path / "source")
    cut_after(5, source, tmp_path / "out")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(StorageError, match=r"source model.safetensors: '.*' then, '.*' now"):
        streamed(source, tmp_path / "out", config(2), **OPTIONS)


def test_a_folder_of_other_things_is_left_alone(llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"expected a new or empty folder.*found \['notes.txt'\]"):
        streamed(llama_dir, tmp_path, config(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_seen_first(llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(StorageError, match=r"expected 0\.\d+ GB of free disk for the output, found 0.00 GB"):
        streamed(llama_dir, tmp_path / "out", config(2))
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(llama_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    journal = Journal(tmp_path / "out", {"options": {}}, WORK_FOLDER)
    with pytest.raises(StorageError, match="expected no other process writing there"):
        streamed(llama_dir, tmp_path / "out", config(2))
    journal.close()


@pytest.mark.slow
def test_killed(llama_dir: Path, tmp_path: Path) -> None:
    def arguments(out: Path) -> list[str]:
        options = ["--bits", "2", "--method", "loftq", "--rank", "4", "--shard-size", "0.001", "--device", "cpu"]
        return ["init", "--model", str(llama_dir), "--out", str(out), *options]

    out, whole = tmp_path / "out", tmp_path / "whole"
    Held(out, 7, "loftq", *arguments(out)).killed()
    loftq_here(*arguments(out))
    loftq_here(*arguments(whole))
    assert contents(out) == contents(whole)
