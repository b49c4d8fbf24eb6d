"""Whose random state dropout draws from, where ranks have different parts of an input.

Megatron keeps two states: one that all ranks of a group share, for what is the same on them, and one of each rank's
own, for parts. A mask over parts that was drawn from the shared state would drop the same places of every part, and one
that was drawn from it by one rank only would put the ranks out of step.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def own_state(module: nn.Module) -> Iterator[bool]:
    """In the block random numbers come from this rank's own state, if the library of ``module`` keeps one; whether it
    does."""
    states: Any = next(filter(None, map(_states_of, type(module).__mro__)), None)
    tracker = None if states is None else states.get_cuda_rng_tracker()
    if tracker is None or not tracker.is_initialized():
        yield False
        return
    with tracker.fork():
        yield True


def _states_of(kind: type) -> Any:
    """The module of random states in the library that ``kind`` is from, if that is loaded."""
    library, found, _ = kind.__module__.partition(".core.")
    return sys.modules.get(f"{library}.core.tensor_parallel.random") if found else None
