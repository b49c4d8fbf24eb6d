"""``loftq`` with its arguments: in this process, which has loaded all it needs, or in one that can be killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from loftq.cli import app
from loftq.disk.task import WORK_FOLDER


def loftq_here(*arguments: object) -> str:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def loftq_killed(out: Path, units: int, *arguments: object) -> None:
    """The command in a process of its own, killed when ``out``'s journal has ``units`` lines."""
    command = [sys.executable, "-c", "from loftq.cli import app; app()", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / WORK_FOLDER / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < units):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() != 0, "it was still at work"
