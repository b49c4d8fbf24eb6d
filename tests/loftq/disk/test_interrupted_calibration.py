"""A run that looks at inputs, or that chooses bits first, is cut off anywhere and ends with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calibrated_runs import add_tokenizer, calibrated, rows, write_text
from commands import loftq_here
from disk_models import contents, streamed, write
from held import Held
from tiny_llama import llama

import loftq.disk.chosen_bits
import loftq.disk.replacements
from loftq.bits.budget import Budget
from loftq.disk.checkpoint import StoredTensor
from loftq.disk.stream import stream
from loftq.disk.task import WORK_FOLDER, Task
from loftq.starts.report import Report
from qlora_kit import LoraConfig
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.errors import ConfigError, StorageError

TARGETS = ["q_proj", "v_proj", "down_proj"]  # several inputs in a block, and two blocks
SHARD = 20_000


class CutError(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama(), tmp_path_factory.mktemp("source"))


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a tiny run's time, and are looked at elsewhere."""
    monkeypatch.setattr(Report, "plot", lambda *_: None)


def lora(method: str, **options: Any) -> LoraConfig:
    return calibrated(method, **{"targets": TARGETS, **options})


def cut_after(count: int, task: Task) -> None:
    def progress(unit: StoredTensor, weights: int) -> None:
        nonlocal count
        count -= 1
        if not count:
            raise CutError

    with pytest.raises(CutError):
        stream(task, progress=progress)
    assert not (task.out / "config.json").exists(), "a folder that was cut off is no model"


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, path_of: Callable[..., str]) -> list[str]:
    """The paths that the function ``name`` is called for from now on."""
    found: list[str] = []
    original = getattr(module, name)

    def counting(*args: Any, **options: Any) -> Any:
        found.append(path_of(*args))
        return original(*args, **options)

    monkeypatch.setattr(module, name, counting)
    return found


def count_starts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch, loftq.disk.replacements, "start_of", lambda request, *_: request.path)


def count_measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return counted(monkeypatch, loftq.disk.chosen_bits, "measured", lambda _, request, *__: request.path)


# -- while calibrating -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qera", "aligned"])
def test_cut_at_every_unit(method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = streamed(source, tmp_path / "whole", lora(method), shard_bytes=SHARD)
    expected = contents(tmp_path / "whole")
    assert sum(name.startswith("model-") for name in expected) > 1, "shards are cut between units too"
    for count in range(1, len(whole.layers) + 2):
        out = tmp_path / str(count)
        task = Task(source, out, lora(method), shard_bytes=SHARD)
        cut_after(count, task)
        assert not any(entry.is_dir() for entry in (out / WORK_FOLDER).iterdir()), "activations are gone at once"
        with monkeypatch.context() as patched:
            started = count_starts(patched)
            report = stream(task)
        assert contents(out) == expected, count
        assert len(started) == len(whole.layers) - min(count, len(whole.layers)), "finished ones aren't started again"
        assert [row.output_error for row in report.layers] == [row.output_error for row in whole.layers]
        assert [row.tokens for row in report.layers] == [rows().numel()] * len(whole.layers)


@pytest.mark.parametrize("method", ["qera", "aligned"])
@pytest.mark.slow
def test_cut_again_and_again(method: str, source: Path, tmp_path: Path) -> None:
    task = Task(source, tmp_path / "out", lora(method), shard_bytes=SHARD, activation_bytes=1)
    for count in (2, 3, 5, 6, 9):  # of all units, those of earlier runs included
        cut_after(count, task)
    stream(task)
    streamed(source, tmp_path / "whole", lora(method), shard_bytes=SHARD)
    assert contents(task.out) == contents(tmp_path / "whole")


def test_what_a_killed_run_left_of_its_activations_is_taken_away(source: Path, tmp_path: Path) -> None:
    task = Task(source, tmp_path / "out", lora("qera"))
    cut_after(2, task)
    left = task.out / WORK_FOLDER / "tmpabcd"
    left.mkdir()
    (left / "run-1-0-0.bin").write_bytes(b"activations")
    stream(task)
    assert not left.exists()


@pytest.mark.slow
def test_changes_of_finished_modules_are_read_back_as_they_were_made(source: Path, tmp_path: Path) -> None:
    """The embedding as well, which is stored in floats, and other bits by layer."""
    config = lora("aligned", targets=["embed_tokens", "q_proj", "down_proj"], bits_pattern={"q_proj": 3})
    task = Task(source, tmp_path / "out", config)
    for count in (1, 2, 3, 4):
        cut_after(count, task)
    stream(task)
    streamed(source, tmp_path / "whole", config)
    assert contents(task.out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--method", "aligned", "--bits", "2"], ["--method", "qera", "--bits", "2.5"]])
def test_killed(options: list[str], tmp_path: Path) -> None:
    source = add_tokenizer(write(llama(), tmp_path / "source"))
    text = write_text(tmp_path / "text.txt")

    def arguments(out: Path) -> list[str]:
        common = ["--rank", "4", "--steps", "2", "--shard-size", "0.001", "--device", "cpu", "--activations", "1B"]
        calibration = ["--calibration", str(text), "--calibration-tokens", "20", *options]
        return ["init", "--model", str(source), "--out", str(out), *common, *calibration]

    out, whole = tmp_path / "out", tmp_path / "whole"
    Held(out, 5, "loftq", *arguments(out)).killed()
    loftq_here(*arguments(out))
    loftq_here(*arguments(whole))
    assert contents(out) == contents(whole)
    assert not any(entry.is_dir() for entry in (out / WORK_FOLDER).iterdir()), "no activations are left"


# -- while choosing bits ---------------------------------------------------------------------------------------


def measured_in(out: Path) -> list[str]:
    lines = [json.loads(line) for line in (out / WORK_FOLDER / "journal.jsonl").read_text().splitlines()]
    return [line["path"] for line in lines if "measured" in line]


@pytest.mark.parametrize("method", ["loftq", "qera", "aligned"])
@pytest.mark.slow
def test_cut_while_layers_are_measured(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(bits=2.5, ranks=(2, 4))
    whole = streamed(source, tmp_path / "whole", lora(method), budget=budget)
    layers = measured_in(tmp_path / "whole")
    assert len(layers) == len(whole.layers) == 6
    assert len({row.quant_type for row in whole.layers}) > 1
    for count in (1, 6):
        task = Task(source, tmp_path / str(count), lora(method), budget=budget)
        note = Journal.note

        def cut(journal: Journal, path: str, choices: Any, note: Any = note, count: int = count) -> None:
            note(journal, path, choices)
            if len(journal.measured) == count:
                raise CutError

        with monkeypatch.context() as patched:
            patched.setattr(Journal, "note", cut)
            with pytest.raises(CutError):
                stream(task)
        assert measured_in(task.out) == layers[:count]
        with monkeypatch.context() as patched:
            measured = count_measured(patched)
            stream(task)
        assert measured == layers[count:], "measured ones aren't measured again"
        assert contents(task.out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_cut_after_bits_were_chosen(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = Budget(bits=2.5)
    streamed(source, tmp_path / "whole", lora("qera"), budget=budget)
    task = Task(source, tmp_path / "out", lora("qera"), budget=budget)
    cut_after(3, task)
    measured, started = count_measured(monkeypatch), count_starts(monkeypatch)
    stream(task)
    assert (len(measured), len(started)) == (0, 3)
    assert contents(task.out) == contents(tmp_path / "whole")


# -- another task in the same folder ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "cloq"}, r"method='qera' then, method='cloq' now"),
        ({"damping": 0.1}, r"damping=None then, damping=0\.1 now"),
        ({"text": 1}, r"calibration='text\.txt, .*' then, calibration='text\.txt, .*' now"),
        ({"calibration_rows": 6}, r"calibration_rows=10 then, calibration_rows=6 now"),
        ({"budget": Budget(bits=2.5)}, r"loftq_bits=2 then, loftq_bits=2\.5 now"),
        ({"outputs": True}, r"outputs=False then, outputs=True now"),
    ],
)
@pytest.mark.slow
def test_another_task_is_refused_with_what_differs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = add_tokenizer(write(llama(num_hidden_layers=1), tmp_path / "source"))

    def task(method: str = "qera", text: int = 0, budget: Any = None, outputs: bool = False, **loftq: Any) -> Task:
        file = write_text(tmp_path / "text.txt", seed=text)
        options = {"calibration": str(file), "calibration_tokens": 20, "calibration_rows": 10, **loftq}
        return Task(source, tmp_path / "out", lora(method, **options), budget=budget, outputs=outputs)

    cut_after(2, task())
    before = (tmp_path / "out" / WORK_FOLDER / "journal.jsonl").read_bytes()
    with pytest.raises(StorageError, match=message):
        stream(task(**changes))
    assert (tmp_path / "out" / WORK_FOLDER / "journal.jsonl").read_bytes() == before
    stream(task())


@pytest.mark.slow
def test_memory_for_activations_may_change(source: Path, tmp_path: Path) -> None:
    """No byte of the output depends on it."""
    cut_after(3, Task(source, tmp_path / "out", lora("qera")))
    stream(Task(source, tmp_path / "out", lora("qera"), activation_bytes=1))
    streamed(source, tmp_path / "whole", lora("qera"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_impossible_budget_leaves_the_folder_free_for_another(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory: expected at least [0-9]+ bytes") as caught:
        streamed(source, tmp_path / "out", lora("qera"), budget=Budget(memory=1000))
    assert not (tmp_path / "out").exists()
    said = int(str(caught.value).split("at least ")[1].split()[0])
    report = streamed(source, tmp_path / "out", lora("qera"), budget=Budget(memory=said))
    assert {row.quant_type for row in report.layers} == {"signed2"}
