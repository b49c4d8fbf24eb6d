"""Moments of one module's inputs in two models at once: the original, and the one that it becomes."""

from __future__ import annotations

from torch import Tensor

from .moments import Moments


class Pairs:
    """Moments of a module's inputs in the model as it becomes, and with the original's, batch by batch. Memory: two
    matrices, and two for every other batch.

    Args:
        width: of the vocabulary, where the inputs are tokens.
        apart: of one batch alone, for another to ``take``.
    """

    def __init__(self, width: int | None, *, apart: bool = False) -> None:
        self.width, self.paired = width, width is None
        self.own, self.cross = Moments(diagonal=width is not None, apart=apart), Moments(apart=apart)
        self.half, self.half_cross = Moments(apart=apart), Moments(apart=apart)

    def add(self, number: int, seen: list[Tensor], x: list[Tensor]) -> None:
        """Take in the batch of that ``number``: its rows as they become, call by call, and the original's."""
        half, half_cross = (self.half, self.half_cross) if self.paired and number % 2 == 0 else (None, None)
        for mine in seen:
            if self.width is None:
                self.own.add(mine, part=half)
            else:
                self.own.add_tokens(mine, self.width)
        # A router may send other tokens here than it used to.
        self.paired = self.paired and [len(rows) for rows in seen] == [len(rows) for rows in x]
        for mine, its in zip(seen, x, strict=True) if self.paired else ():
            self.cross.add(its, mine, part=half_cross)

    def take(self, part: Pairs) -> None:
        """Take in the batch of ``part``, as if it had been given to this."""
        self.paired &= part.paired
        for mine, its in zip(self._all(), part._all(), strict=True):
            mine.take(its)

    def _all(self) -> tuple[Moments, ...]:
        return self.own, self.cross, self.half, self.half_cross
