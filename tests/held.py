"""A command in a process of its own that stands still once so much is finished, for a test to end it there.

To watch its journal and be quick enough is a race: on a busy machine the command is done before the watcher looks.
Here the command itself waits, in ``Journal.add`` and where units are put that lie ready, until it is released or ended.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from loftq.disk.ahead import PATTERN, Ahead
from qlora_kit.checkpoints.journal import Journal

# Seconds until one that doesn't come so far is an error: on a busy machine starting two processes takes a minute.
PATIENCE = 300


def finished(out: Path) -> int:
    """Units that are finished in the output folder ``out``, written or lying ready."""
    lines = [journal.read_bytes().count(b"\n") for journal in out.glob(".*/journal.jsonl")]
    return max(0, sum(lines) - 1) + len(list(out.glob(f".*/{PATTERN}")))


class Held:
    """``python -m PACKAGE ARGUMENTS``, begun; ``PACKAGE`` writes into ``out`` and stands still at ``units`` of them.

    Args:
        launcher: what starts this file, instead of Python; every process that it starts stands still.
    """

    def __init__(
        self, out: Path, units: int, package: str, *arguments: object, launcher: tuple[str, ...] = (sys.executable,)
    ) -> None:
        self.out = out
        self.signs = out.with_name(f"{out.name}.held")
        self.signs.mkdir()
        self.printed = self.signs / "printed"
        told = [str(out), str(units), package, *map(str, arguments)]
        with self.printed.open("w") as file:
            self.process = subprocess.Popen(
                [*launcher, __file__, *told],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell starts what runs behind it with the signal ignored, and children inherit that.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
            )
        until = time.monotonic() + PATIENCE
        while not any(self.signs.glob("standing-*")):
            assert self.process.poll() is None, f"it was still at work: {self.text()}"
            assert time.monotonic() < until, self.text()
            time.sleep(0.01)

    def release(self) -> None:
        """Let those that stand still go on, if they live."""
        (self.signs / "released").touch()

    def ended(self) -> int:
        """The exit status, once it has ended."""
        return self.process.wait(PATIENCE)

    def killed(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        assert self.ended() == -signal.SIGKILL, "it was still at work"

    def text(self) -> str:
        """What all of its processes printed."""
        return self.printed.read_text()


def _standing(out: Path, units: int, method: Any) -> Any:
    """``method``, after which its process waits if that many units are finished."""
    signs = out.with_name(f"{out.name}.held")

    def then_stands(*arguments: Any, **options: Any) -> None:
        method(*arguments, **options)
        if finished(out) >= units:
            (signs / f"standing-{os.getpid()}").touch()
            while not (signs / "released").exists():
                time.sleep(0.01)

    return then_stands


def _run(out: str, units: str, package: str, *arguments: str) -> None:
    for kind, name in ((Journal, "add"), (Ahead, "put")):
        setattr(kind, name, _standing(Path(out), int(units), getattr(kind, name)))
    sys.argv[:] = [package, *arguments]
    runpy.run_module(package, run_name="__main__")


if __name__ == "__main__":
    sys.path[0] = ""  # as -m has it: where the command is given, not where this file lies
    _run(*sys.argv[1:])
