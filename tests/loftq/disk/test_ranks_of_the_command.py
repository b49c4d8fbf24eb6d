"""``torchrun -m loftq init``: one process prints, all end as they should, and what is finished is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from commands import loftq_here
from disk_models import contents, write
from held import PATIENCE, Held, finished
from tiny_llama import llama

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


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


def on_two(*arguments: str) -> tuple[int, str]:
    """The command on two processes: its exit status, and what all of them print."""
    run = subprocess.run(
        [*TORCHRUN, "-m", "loftq", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    return run.returncode, run.stdout


def ranks_of(held: Held) -> list[int]:
    """Its processes, in the order of their ranks."""
    children = Path(f"/proc/{held.process.pid}/task/{held.process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.engines)])
def test_a_process_that_dies(rank: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    """One process goes on with what the two have finished; what is left of them says so, even of that which leads."""
    out = tmp_path / "out"
    started = Held(out, 4, "loftq", *arguments(source, out), launcher=TORCHRUN)
    os.kill(ranks_of(started)[rank], signal.SIGKILL)
    started.release()
    assert started.ended() == 1
    said = [line for line in started.text().splitlines() if line.startswith("loftq init:")]
    assert len(said) == 1, started.text()
    assert said[0].endswith("what is finished is kept: the same command goes on from there")
    assert not (out / "config.json").exists(), "a folder that was cut off is no model"
    assert finished(out) > 3, "nothing finished is lost"
    loftq_here(*arguments(source, out))
    assert contents(out) == whole


@pytest.mark.engines
def test_two_go_on_with_what_one_began(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    Held(out, 5, "loftq", *arguments(source, out)).killed()
    status, text = on_two(*arguments(source, out))
    assert status == 0, text
    assert contents(out) == whole
    assert text.count("wrote ") == 1, "one of them prints"


@pytest.mark.engines
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_stopped_by_its_user(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    started = Held(out, 4, "loftq", *arguments(source, out), launcher=TORCHRUN)
    for process in ranks_of(started):  # as a terminal does, to each of them
        os.kill(process, signal.SIGINT)
    started.release()
    assert started.ended() == 1
    text = started.text()
    assert text.count("loftq init: stopped; what is finished is kept: the same command goes on from there") == 1, text
    assert text.count("exitcode  : 130") >= 1, text
    assert finished(out) > 3
    status, text = on_two(*arguments(source, out))
    assert status == 0, text
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
    status, text = on_two(*arguments(source, tmp_path / "out", *mistake))
    assert status == 1
    said = [line for line in text.splitlines() if line.startswith("loftq init: ")]
    assert len(said) == 1, text
    assert named in said[0]
    assert text.count("Traceback") == 1, "torchrun's own"
    assert not (tmp_path / "out").exists()
