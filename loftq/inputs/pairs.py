"""Moments of one module's inputs in two models at once: the original, and the one that it becomes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..methods.halves import Half
from .moments import Moments


@dataclass
class Given:
    """What a module is given in a forward.

    Attributes:
        rows: of its inputs, call by call.
        stream: rows of what its output is then added to, call by call; empty where it isn't known.
    """

    rows: list[Tensor] = field(default_factory=list)
    stream: list[Tensor] = field(default_factory=list)


class Pairs:
    """Moments of a module's inputs in the model as it becomes, and with the original's, batch by batch; and of what the
    stream that its output is added to falls short of the original's. Memory: two matrices, or three, and as many for
    the first half of the batches: a text's later part is often about other things, and what the halves confirm of each
    other then holds for more than the one text.

    Args:
        width: of the vocabulary, where the inputs are tokens.
        count: of all batches.
        apart: of one batch alone, for another to ``take``.
    """

    def __init__(self, width: int | None, count: int, *, apart: bool = False) -> None:
        self.count = count
        self.width, self.paired, self.followed = width, width is None, width is None
        self.own, self.cross = Moments(diagonal=width is not None, apart=apart), Moments(apart=apart)
        self.half, self.half_cross = Moments(apart=apart), Moments(apart=apart)
        self.shortfall, self.half_shortfall = Moments(apart=apart), Moments(apart=apart)

    def add(self, number: int, seen: Given, x: Given) -> None:
        """Take in the batch of that ``number``: what is given as the model becomes, and in the original."""
        early = self.paired and 2 * number < self.count
        for mine in seen.rows:
            if self.width is None:
                self.own.add(mine, part=self.half if early else None)
            else:
                self.own.add_tokens(mine, self.width)
        # A router may send other tokens here than it used to.
        self.paired = self.paired and _lengths(seen.rows) == _lengths(x.rows)
        for mine, its in zip(seen.rows, x.rows, strict=True) if self.paired else ():
            self.cross.add(its, mine, part=self.half_cross if early else None)
        lengths = _lengths(seen.stream), _lengths(x.stream)
        self.followed = self.followed and self.paired and lengths == (_lengths(seen.rows),) * 2
        for mine, became, was in zip(seen.rows, seen.stream, x.stream, strict=True) if self.followed else ():
            self.shortfall.add(was.float() - became.float(), mine, part=self.half_shortfall if early else None)

    def take(self, part: Pairs) -> None:
        """Take in the batch of ``part``, as if it had been given to this."""
        self.paired &= part.paired
        self.followed &= part.followed
        for mine, its in zip(self._all(), part._all(), strict=True):
            mine.take(its)

    def means(self, path: str) -> tuple[Tensor, Tensor | None, Tensor | None, Half | None] | None:
        """E[x^ x^^T], where the models' inputs are pairs E[x x^^T], where there is a stream E[(h - h^) x^^T], and the
        same of the first half of the batches, where these and the others had inputs. None if no input came.

        Raises:
            ConfigError: an input isn't finite; names ``path``.
        """
        own = self.own.matrix(path)
        if own is None:
            return None
        cross = self.cross.matrix(path) if self.paired else None
        shortfall = self.shortfall.matrix(path) if self.followed else None
        half, half_cross = self.half.matrix(path), self.half_cross.matrix(path)
        if cross is None or half is None or half_cross is None or self.half.count == self.own.count:
            return own, cross, shortfall, None
        half_shortfall = self.half_shortfall.matrix(path) if self.followed else None
        return own, cross, shortfall, Half(half, half_cross, self.half.count / self.own.count, half_shortfall)

    def _all(self) -> tuple[Moments, ...]:
        return self.own, self.cross, self.half, self.half_cross, self.shortfall, self.half_shortfall


def _lengths(parts: list[Tensor]) -> list[int]:
    return [len(rows) for rows in parts]
