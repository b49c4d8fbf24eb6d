"""What a block's modules are given in the original model: the same whatever they become, so it is computed once."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import Tensor

from .moments import rows_of
from .walk import Run, Walk


class KeptInputs:
    """Rows of inputs by run and path, of as many runs as ``walk`` has room for.

    Attributes:
        nbytes: of what is kept.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk, self.nbytes = walk, 0
        self._rows: dict[tuple[int, str], list[Tensor]] = {}
        self._full = False
        self._last: tuple[Tensor, int, Tensor] | None = None

    def add(self, run: Run, path: str, value: Tensor) -> None:
        """Keep ``value``, which the module at ``path`` is given next; from where there is no room, of no run."""
        if self._full:
            return
        if self._last is None or self._last[0] is not value or self._last[1] != value._version:
            if not self.walk.has_room(value, beside=self.nbytes):
                self._full, self._last = True, None
                self._drop(key for key in self._rows if key[0] == run.index)
                return
            copy = rows_of(value, run.mask).clone()  # what comes after may work in place
            self._last, self.nbytes = (value, value._version, copy), self.nbytes + copy.nbytes
        self._rows.setdefault((run.index, path), []).append(self._last[2])

    def keep_only(self, paths: Container[str]) -> None:
        """Forget what other modules were given."""
        self._last = None
        self._drop(key for key in self._rows if key[1] not in paths)

    def take(self, run: Run, path: str) -> list[Tensor] | None:
        """The rows that the module at ``path`` was given, call by call, once; None if they weren't kept."""
        return self._rows.pop((run.index, path), None)

    def _drop(self, keys: Iterable[tuple[int, str]]) -> None:
        for key in list(keys):
            del self._rows[key]
