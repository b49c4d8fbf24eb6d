"""``loftq`` with its arguments in this process, which has loaded all it needs."""

from __future__ import annotations

from typer.testing import CliRunner

from loftq.cli import app


def loftq_here(*arguments: object) -> str:
    outcome = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output
