"""Bars on the terminal: weights or steps done of all, and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .checkpoint import StoredTensor

_TIMES = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())


@contextmanager
def bar() -> Iterator[Callable[[StoredTensor, int], None]]:
    """A function to call with each finished unit and the number of weights in all."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        *_TIMES,
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=None, visible=False)  # nothing shows until something is done

        def advance(unit: StoredTensor, weights: int) -> None:
            progress.update(task, total=weights, advance=unit.numel, description=unit.name, visible=True)

        yield advance


@contextmanager
def steps_bar() -> Iterator[Callable[[int, int], None]]:
    """A function to call with the steps that are done and their number."""
    columns = (TextColumn("{task.completed:.0f} of {task.total:.0f} steps"), BarColumn(), *_TIMES)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=1, visible=False)

        def advance(done: int, number: int) -> None:
            progress.update(task, total=number, completed=done, visible=True)

        yield advance
