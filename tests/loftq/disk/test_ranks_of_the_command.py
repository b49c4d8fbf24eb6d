"""``torchrun -m loftq init``: one process prints, all end as they should, and what is finished is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import loftq_here, loftq_killed
from disk_models import contents, write
from tiny_llama import llama

from loftq.disk.ahead import PATTERN
from loftq.disk.task import WORK_FOLDER

pytestmark = pytest.mark.slow
# Seconds: on a busy machine starting two processes takes a minute.
PATIENCE = 300
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers that take long enough for a run to be cut off between them."""
    return write(llama(hidden_size=160, intermediate_size=320, num_hidden_layers=2), tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process that isn't cut off writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    loftq_here(*arguments(source, out))
    return contents(out)


def arguments(source: Path, out: Path, *more: str) -> list[str]:
    common = ["--bits", "2", "--method", "loftq", "--rank", "8", "--steps", "12", "--shard-size", "0.001"]
    return ["init", "--model", str(source), "--out", str(out), *common, "--device", "cpu", *more]


class Started:
    """The command on two processes, with what all of them print."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.printed = folder / "printed"
        with self.printed.open("w") as file:
            self.run = subprocess.Popen(
                [*TORCHRUN, "-m", "loftq", *arguments], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Its processes, in the order of their ranks."""
        children = Path(f"/proc/{self.run.pid}/task/{self.run.pid}/children").read_text().split()
        found = {}
        for child in children:
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, there: Callable[[], bool]) -> None:
        until = time.monotonic() + PATIENCE
        while not there() and self.run.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        assert self.run.poll() is None, self.text()

    def ended(self) -> int:
        return self.run.wait(PATIENCE)

    def text(self) -> str:
        return self.printed.read_text()


def lines(out: Path) -> int:
    """Of the journal: its head, and one for each finished unit."""
    journal = out / WORK_FOLDER / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def made(out: Path) -> int:
    """Units that are finished, written or lying ready."""
    return lines(out) - 1 + len(list((out / WORK_FOLDER).glob(PATTERN)))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.engines)])
def test_a_process_that_dies(rank: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One process goes on with what the two have finished; what is left of them says so, even of that which leads."""
    out = tmp_path / "out"
    started = Started(tmp_path, *arguments(source, out))
    started.wait_for(lambda: lines(out) > 0 and made(out) > 3)
    os.kill(started.ranks()[rank], signal.SIGKILL)
    assert started.ended() == 1
    said = [line for line in started.text().splitlines() if line.startswith("loftq init:")]
    assert len(said) == 1, started.text()
    assert said[0].endswith("what is finished is kept: the same command goes on from there")
    assert not (out / "config.json").exists(), "a folder that was cut off is no model"
    assert made(out) > 3, "nothing finished is lost"
    loftq_here(*arguments(source, out))
    assert contents(out) == whole


@pytest.mark.engines
def test_two_go_on_with_what_one_began(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    loftq_killed(out, 6, *arguments(source, out))
    started = Started(tmp_path, *arguments(source, out))
    assert started.ended() == 0, started.text()
    assert contents(out) == whole
    text = started.text()
    assert text.count("wrote ") == 1, "one of them prints"


@pytest.mark.engines
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_stopped_by_its_user(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = Started(tmp_path, *arguments(source, out))
    started.wait_for(lambda: lines(out) > 0 and made(out) > 3)
    for process in started.ranks():  # as a terminal does, to each of them
        os.kill(process, signal.SIGINT)
    assert started.ended() == 1
    text = started.text()
    assert text.count("loftq init: stopped; what is finished is kept: the same command goes on from there") == 1, text
    assert text.count("exitcode  : 130") >= 1, text
    before = made(out)
    again = Started(tmp_path, *arguments(source, out))
    assert again.ended() == 0, again.text()
    assert before > 3
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        (["--method", "nothing"], "--method"),
        pytest.param(["--targets", "no_proj"], "no_proj", marks=pytest.mark.engines),
    ],
)
def test_a_mistake_is_said_once(mistake: list[str], named: str, source: Path, tmp_path: Path) -> None:
    """Of the options, or of what they are about."""
    started = Started(tmp_path, *arguments(source, tmp_path / "out", *mistake))
    assert started.ended() == 1
    text = started.text()
    said = [line for line in text.splitlines() if line.startswith("loftq init: ")]
    assert len(said) == 1, text
    assert named in said[0]
    assert text.count("Traceback") == 1, "torchrun's own"
    assert not (tmp_path / "out").exists()
