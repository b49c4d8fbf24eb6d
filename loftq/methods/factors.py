"""What is made of one input's moments, once for all weights that are given that input, as q, k and v are.

A Cholesky factor of R and an LU decomposition cost as much as quantizing a weight does, and are the same for each.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any

from torch import Tensor


class Factors:
    """Remembers what was made of moments for as long as it is kept itself; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[Hashable, tuple[tuple[Tensor, ...], Any]] = {}

    def of(self, moments: tuple[Tensor, ...], what: Hashable, make: Callable[[], Any]) -> Any:
        """``make()``, or what it gave before for the same ``what`` of the same ``moments``, unchanged since."""
        key = what, tuple((t.data_ptr(), t._version, tuple(t.shape), t.dtype, t.device) for t in moments)
        with self._lock:
            if key not in self._found:
                # With the moments, so that no others come to lie at their address.
                self._found[key] = moments, make()
            return self._found[key][1]


def made(factors: Factors | None, moments: tuple[Tensor, ...], what: Hashable, make: Callable[[], Any]) -> Any:
    """``factors.of(...)``, or ``make()`` where there are none to share."""
    return make() if factors is None else factors.of(moments, what, make)
