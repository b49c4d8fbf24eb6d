"""Rows of one batch that go through adapters of their own: which of a layer's inputs are whose.

A layer doesn't see where its inputs come from, only how many there are. A whole number of them for each row, in order,
is what beams give, and so do models that lay the words of all rows end to end before a head or a router. Experts that
are handed some of the words, tables of positions, and layouts with words first have another number. So what is counted
is the rows, times the beams, times the words of a row; any other number is refused and not guessed at. Where all rows
have one adapter, nothing has to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterError

#: The name for no adapter.
BASE = "__base__"
#: PEFT's keyword for the names.
KEYWORD = "adapter_names"
#: Places among a layer's inputs: those next to each other as a slice, which copies nothing.
Where = slice | Tensor


@dataclass(frozen=True)
class Even:
    """Adapters that equally many inputs go through, and the places of these, one adapter's after the other's."""

    names: tuple[str, ...]
    where: Where


class Rows:
    """Which adapter each row of a batch goes through.

    Args:
        names: one for each row; ``BASE`` for none.
        layers: ids of the modules that this is for; None for a single one, called with names of its own.
        copies: how many inputs in a row may stand for one row, as beams do.
        lengths: how many words a row may have, where layers are handed these end to end; those seen are added.
        path_of: a layer's name, for messages.
    """

    def __init__(
        self,
        names: Sequence[str],
        layers: frozenset[int] | None = None,
        *,
        copies: frozenset[int] = frozenset({1}),
        lengths: set[int] | None = None,
        path_of: Callable[[Any], str] = lambda layer: type(layer).__name__,
    ) -> None:
        self.names = tuple(names)
        self.layers = layers
        self.copies = copies
        self.lengths = set() if lengths is None else lengths
        self.path_of = path_of
        self._distinct = tuple(dict.fromkeys(self.names))
        self._where: dict[Any, dict[str, Where]] = {}
        self._asked: dict[Any, dict[str, Where]] = {}  # the same, by what is at hand at each call
        self._even: dict[int, Even | None] = {}  # by the id of one of these

    def own(self, names: Container[str]) -> tuple[str, ...]:
        """For each row its adapter, or ``BASE`` where that isn't one of ``names``."""
        return tuple(name if name in names else BASE for name in self.names)

    def where(self, layer: Any, x: Tensor, names: Container[str]) -> dict[str, Where]:
        """For each of ``names`` that rows go through, and for ``BASE``, its places in ``x``, a layer's inputs (rows,
        ...).

        Raises:
            AdapterError: it isn't known which rows of ``x`` belong to which of the batch.
        """
        held = tuple([name for name in self._distinct if name in names])
        asked = held, x.shape, x.dtype, x.device
        if (found := self._asked.get(asked)) is None:
            found = self._asked[asked] = self._find(layer, x, held)
        return found

    def _find(self, layer: Any, x: Tensor, names: Container[str]) -> dict[str, Where]:
        """What ``where`` gives for the first such inputs."""
        own = self.own(names)
        if self.layers is None and x.shape[:1] != (len(own),):
            raise AdapterError(
                f"{KEYWORD}: expected a name for each input of this {self.path_of(layer)}, which are of shape "
                f"{tuple(x.shape)}, found {len(own)} names; name each, {BASE!r} for none"
            )
        if len(set(own)) == 1 or x.shape[:1] == (0,):
            return {own[0]: slice(None)}
        key = own, self.repeats(layer, x), x.device
        if key not in self._where:
            self._where[key] = {name: _places(own, *key[1:], name) for name in dict.fromkeys(own)}
        return self._where[key]

    def side_by_side(self, groups: Mapping[str, Where]) -> Even | None:
        """``groups``, what ``where`` gave, as one; None where they aren't of one size, or it is a single one."""
        if len(groups) == 1:
            return None
        if id(groups) not in self._even:
            self._even[id(groups)] = _even({name: where for name, where in groups.items() if name != BASE})
        return self._even[id(groups)]

    def repeats(self, layer: Any, x: Tensor) -> int:
        """How many of ``layer``'s inputs ``x`` stand for one row of the batch; see ``where``."""
        repeats, rest = divmod(len(x), len(self.names)) if x.ndim else (0, 1)
        if not rest and repeats in self.copies:
            self.lengths.update(words_of(x))
        elif rest or not any(repeats == copies * length for copies in self.copies for length in self.lengths):
            raise AdapterError(
                f"{self.path_of(layer)}: expected inputs for each of the {len(self.names)} rows of {KEYWORD}, found "
                f"some of shape {tuple(x.shape)}, which don't tell what row they belong to; call set_adapter(name) and "
                "run the rows of each adapter by themselves"
            )
        return repeats

    def at(self, where: Where, repeats: int) -> Rows:
        """The same for some inputs by themselves, of which ``repeats`` stand for one row here."""
        names = [name for name in self.names for _ in range(repeats)]
        picked = names[where] if isinstance(where, slice) else [names[i] for i in where.tolist()]
        return Rows(picked, self.layers, lengths=self.lengths, path_of=self.path_of)


def words_of(x: Tensor) -> list[int]:
    """How many words each row of ``x`` has: of ids (rows, words) or (rows, choices, words), where each choice counts
    too, or vectors (rows, words, width)."""
    shape = x.shape[1:] if not x.is_floating_point() else x.shape[1:-1] if x.ndim == 3 else ()
    return [torch.Size(shape[:end]).numel() for end in range(1, len(shape) + 1)]


def _places(own: Sequence[str], repeats: int, device: torch.device, name: str) -> Where:
    rows = [row for row, other in enumerate(own) if other == name]
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0] * repeats, (rows[-1] + 1) * repeats)
    first = torch.tensor(rows, device=device)[:, None] * repeats
    return (first + torch.arange(repeats, device=device)).flatten()


def _even(groups: Mapping[str, Where]) -> Even | None:
    sizes = {w.stop - w.start if isinstance(w, slice) else len(w) for w in groups.values()}
    if len(groups) < 2 or len(sizes) != 1:
        return None
    slices = [w for w in groups.values() if isinstance(w, slice)]
    joined = len(slices) == len(groups) and all(one.stop == other.start for one, other in pairwise(slices))
    if joined:
        return Even((*groups,), slice(slices[0].start, slices[-1].stop))
    device = next((w.device for w in groups.values() if isinstance(w, Tensor)), None)
    parts = [torch.arange(w.start, w.stop, device=device) if isinstance(w, slice) else w for w in groups.values()]
    return Even((*groups,), torch.cat(parts))


def checked(names: Any) -> list[str]:
    """``names`` as a list with a name for each row.

    Raises:
        AdapterError: it isn't one.
    """
    if isinstance(names, str):
        raise AdapterError(f"{KEYWORD}: expected a list with a name for each row, found {names!r}; put it into a list")
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
        raise AdapterError(f"{KEYWORD}: expected a list with a name for each row, found {names!r:.80}")
    return list(names)
