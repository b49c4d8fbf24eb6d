"""How a layer learns which adapter each row goes through.

The choice is a ``ContextVar``, so two threads that serve one model don't see each other's, and it ends with its block.
It says which layers it is for: another model that runs within the block, as an assistant of ``generate`` does, isn't
meant. A compiler can't follow such a variable, and would compile anew for each choice. It sees a flag, whether any
thread has chosen, and compiles layers as ever where none has; where one has, what depends on the choice is left to
Python.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch

from .rows import KEYWORD, Rows, checked

T = TypeVar("T")


def left_to_python(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: a compiler doesn't look into ``function``. Where none is loaded, none is loaded for it."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> T:
        return (_left.get(function) or _leave(function))(*args, **kwargs)

    return call


def _leave(function: Callable[..., T]) -> Callable[..., T]:
    if "torch._dynamo" not in sys.modules:
        return function
    _left[function] = torch.compiler.disable(function)
    return _left[function]


_left: dict[Callable[..., Any], Callable[..., Any]] = {}
_rows: ContextVar[Rows | None] = ContextVar("rows", default=None)
_lock = threading.Lock()


class _Choices:
    """How many blocks are open in all threads, and whether any is, which is what a compiler looks at."""

    count = 0
    any = False


@contextmanager
def in_rows(rows: Rows | None) -> Iterator[None]:
    """In the block, in this thread, the layers that ``rows`` is for compute by it; None is as ever."""
    _count_(1)
    token = _rows.set(rows)
    try:
        yield
    finally:
        _rows.reset(token)
        _count_(-1)


def _count_(step: int) -> None:
    with _lock:
        _Choices.count += step
        _Choices.any = _Choices.count > 0


def rows_of(layer: Any, kwargs: dict[str, Any] | None = None) -> Rows | None:
    """How ``layer`` is to compute: by names among its ``kwargs``, which are taken out, or by the block it is called in.

    Raises:
        AdapterError: what is given for names isn't a list of them.
    """
    names = kwargs.pop(KEYWORD, None) if kwargs else None
    if names is not None:
        return Rows(checked(names))
    return _chosen(layer) if _Choices.any else None


@left_to_python
def _chosen(layer: Any) -> Rows | None:
    rows = _rows.get()
    return rows if rows is None or rows.layers is None or id(layer) in rows.layers else None
