"""A merge on disk that is cut off anywhere goes on, does nothing twice, and ends with the bytes of one that wasn't."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_merges import contents, on_disk, save_adapter, save_base, tensors
from held import Held
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit.folders.merge.run
from qlora_kit import MergeError, StorageError
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.folders.merge.run import WORK_FOLDER

OPTIONS = {"into": "nf4", "shard_bytes": 20_000}
UNITS = 21


class CutError(Exception):
    """Stands for whatever ends a process."""


class Cut:
    """Ends the merge after ``count`` units, and counts those that were made."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 10**9) -> None:
        self.made: list[str] = []
        self.count = count
        make, add = qlora_kit.folders.merge.run.merged_parameter, Journal.add

        def counted(plan: Any, unit: Any, *arguments: Any) -> Any:
            self.made.append(unit.name)
            return make(plan, unit, *arguments)

        def noted(journal: Journal, line: Any, *, done: bool = True) -> None:
            add(journal, line, done=done)
            if len(journal.done) == self.count:
                raise CutError

        patch.setattr(qlora_kit.folders.merge.run, "merged_parameter", counted)
        patch.setattr(Journal, "add", noted)


@pytest.fixture(scope="module")
def whole(bases: dict[str, Path], adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    on_disk(bases["bfloat16"], [adapter], out, **OPTIONS)
    return contents(out)


def cut_after(count: int, base: Path, adapter: Path, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Cut(patch, count)
        with pytest.raises(CutError):
            on_disk(base, [adapter], out, **OPTIONS)


@pytest.mark.slow
def test_a_cut_at_every_unit(bases: dict[str, Path], adapter: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One merge, cut at each of its units in turn."""
    out = tmp_path / "out"
    for count in range(1, UNITS + 1):
        cut_after(count, bases["bfloat16"], adapter, out)
        assert not (out / "config.json").exists(), "a folder that was cut off is no model"
    with pytest.MonkeyPatch.context() as patch:
        last = Cut(patch)
        report = on_disk(bases["bfloat16"], [adapter], out, **OPTIONS)
    assert last.made == []
    assert contents(out) == whole
    assert len(report.layers) == 14


@pytest.mark.parametrize("count", [1, 8, 20])
@pytest.mark.slow
def test_nothing_finished_is_redone(
    count: int, bases: dict[str, Path], adapter: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    cut_after(count, bases["bfloat16"], adapter, tmp_path / "out")
    with pytest.MonkeyPatch.context() as patch:
        rest = Cut(patch)
        on_disk(bases["bfloat16"], [adapter], tmp_path / "out", **OPTIONS)
    assert len(rest.made) == UNITS - count
    assert contents(tmp_path / "out") == whole


def test_what_the_journal_doesn_t_know_of_is_cut_away(
    bases: dict[str, Path], adapter: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cut_after(9, bases["bfloat16"], adapter, out)
    work = out / WORK_FOLDER
    with (work / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"unit": "model.la')  # the line that was being written
    with max(work.glob("part-*.safetensors")).open("ab") as part:
        part.write(b"half a tensor")
    on_disk(bases["bfloat16"], [adapter], out, **OPTIONS)
    assert contents(out) == whole


@pytest.mark.parametrize(
    "place",
    [
        "qlora_kit.checkpoints.growing_model.place",
        "qlora_kit.checkpoints.growing_model.write_text_atomically",
        "qlora_kit.folders.merge.run.write_text_atomically",
        "qlora_kit.folders.merge.run.verify_output",
        "qlora_kit.folders.merge.run.other_files",
    ],
)
@pytest.mark.slow
def test_a_cut_while_finishing(
    place: str, bases: dict[str, Path], adapter: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    def cut(*_: object) -> None:
        raise CutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, cut)
        with pytest.raises(CutError):
            on_disk(bases["bfloat16"], [adapter], tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out" / "config.json").exists()
    on_disk(bases["bfloat16"], [adapter], tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == whole


def test_a_finished_merge_is_left_alone(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = on_disk(bases["bfloat16"], [adapter], out, **OPTIONS)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.parent.name != WORK_FOLDER}
    again = on_disk(bases["bfloat16"], [adapter], out, **OPTIONS)
    assert again.layers == first.layers
    assert (first.verified, again.verified) == (8, 0)
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.slow
def test_another_command_is_refused(
    finished: bool, bases: dict[str, Path], adapter: Path, second: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "out", bases["bfloat16"]
    if finished:
        on_disk(base, [adapter], out, **OPTIONS)
    else:
        cut_after(5, base, adapter, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(
        StorageError, match=r"expected the command that was begun here.*adapter 1 weight: 1.0 then, 0.5"
    ):
        on_disk(base, [adapter], out, weights=[0.5], **OPTIONS)
    with pytest.raises(StorageError, match=r"adapter 2: None then"):
        on_disk(base, [adapter, second], out, **OPTIONS)
    with pytest.raises(StorageError, match=r"adapter 1 adapter_model.safetensors: '.*' then, '.*' now"):
        on_disk(base, [second], out, **OPTIONS)
    with pytest.raises(StorageError, match=r"base model.safetensors: '.*' then, '.*' now"):
        on_disk(bases["float32"], [adapter], out, **OPTIONS)
    with pytest.raises(StorageError, match=r"into='nf4' then, into='fp4' now"):
        on_disk(base, [adapter], out, **{**OPTIONS, "into": "fp4"})
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_folder_of_other_things_is_left_alone(bases: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"expected a new or empty folder.*found \['notes.txt'\]"):
        on_disk(bases["bfloat16"], [adapter], tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_seen_first(
    bases: dict[str, Path], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    written = sum(tensor.nbytes for tensor in tensors(bases["bfloat16"]).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, written - 1))
    with pytest.raises(StorageError, match=r"expected 0\.\d+ GB of free disk for the output, found 0.00 GB"):
        on_disk(bases["bfloat16"], [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, written))
    on_disk(bases["bfloat16"], [adapter], tmp_path / "out")


def test_a_refused_rounding_goes_on_with_force(bases: dict[str, Path], tmp_path: Path) -> None:
    """A delta far smaller than half a step of four bits."""
    base, adapter = bases["nf4"], save_adapter(bases["nf4"], tmp_path / "adapter", ["q_proj"])
    out = tmp_path / "out"
    with pytest.raises(MergeError, match=r"expected rounding to keep at least 50%.*found -?\d+\.\d%.*force=True"):
        on_disk(base, [adapter], out, weights=[1e-3], into="same", force=False)
    assert not (out / "config.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        rest = Cut(patch)
        report = on_disk(base, [adapter], out, weights=[1e-3], into="same", force=True)
    assert rest.made == []
    assert report.retained < 0.5


@pytest.mark.slow
def test_killed(tmp_path: Path) -> None:
    """A process at work is killed; another goes on and ends with the bytes of one that wasn't."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, bos_token_id=0, eos_token_id=None))
    base = save_base(model, tmp_path / "base", "bfloat16")
    adapter = save_adapter(base, tmp_path / "adapter")
    out, whole = tmp_path / "out", tmp_path / "whole"
    options = ["--base", base, "--adapter", adapter, "--into", "int8", "--shard-size", "0.001", "--force"]
    Held(out, 7, "qlora_kit", "merge", *options, "--out", out).killed()
    journal = out / WORK_FOLDER / "journal.jsonl"
    done = [json.loads(line)["unit"] for line in journal.read_text().splitlines()[1:] if line.endswith("}")]
    assert 7 <= len(done) < 147
    on_disk(base, [adapter], out, into="int8", shard_bytes=10**6)
    on_disk(base, [adapter], whole, into="int8", shard_bytes=10**6)
    assert contents(out) == contents(whole)
