"""Which modules of a model are read past: other modules' code takes their weight, beside calling them or instead.

An adapter layer answers with the weight that it computes with (``layers.weight_in_effect``), so it takes part there
too. Few bits can't: what is read of them are codes. So all that quantizes leaves such modules dense. Those that nobody
calls "all-linear" leaves out, and it leaves them out with those that are written to where they are of few bits. Named,
the first take part and the second are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ..codecs import find_codec
from ..errors import TargetError
from ..naming import Tree, base_of
from .source import Path, Use, calls_of, names_in, reads_of


@dataclass(frozen=True)
class Read:
    """How a module's weight is read past it.

    Attributes:
        by: types of the modules that do.
        value: whether they work with the matrix, and don't only look at its dtype or shape.
        written: whether they change it in place.
        called: whether somebody calls the module.
    """

    by: tuple[str, ...]
    value: bool
    written: bool
    called: bool

    @property
    def reason(self) -> str:
        """What to say of it."""
        by = " and ".join(self.by)
        if not self.value:
            return f"the dtype or shape of its weight is read by {by}"
        return f"its weight is read by {by}" + ("" if self.called else ", and nobody calls it")

    @property
    def needs_matrix(self) -> bool:
        """Whether the model computes wrong numbers where the weight isn't the matrix and an adapter is beside it."""
        return self.value and (self.written or not self.called)


class ReadPast:
    """The modules of ``tree`` whose weights other modules' code reads. Works on the meta device.

    Attributes:
        reads: how, by path; each module at its first.
    """

    def __init__(self, model: nn.Module | Tree) -> None:
        self.tree = Tree.of(model)
        self.reads, self._places = self.tree.once(_reads_in)

    def get(self, path: str) -> Read | None:
        """How the module at ``path`` is read, any of its paths."""
        return self.reads.get(self.tree.first(path))

    def left_out(self) -> dict[str, str]:
        """What "all-linear" leaves out, and why, by all paths."""
        found = {}
        for path in self.tree.modules:
            read = self.get(path)
            if read is not None and read.value and (not read.called or self._is_refused(path, read)):
                found[path] = read.reason
        return found

    def dense(self) -> dict[str, str]:
        """What must not be stored in few bits, and why, by all paths."""
        found = ((path, self.get(path)) for path in self.tree.modules)
        return {path: read.reason for path, read in found if read is not None}

    def on_the_spot(self) -> list[str]:
        """Modules whose weights have to be where the model computes all the time, each at its first path: hooks that
        bring a module's weights for its call come too late where another reads them, or asks where they are."""
        uncalled = (path for path, read in self.reads.items() if read.value and not read.called)
        return sorted({*uncalled, *self._places})

    def check(self, path: str) -> None:
        """Raise a TargetError where an adapter at ``path`` couldn't take part in what reads its base's weight."""
        read = self.get(path)
        if read is not None and self._is_refused(path, read):
            kind = type(base_of(self.tree.modules[path])).__name__
            raise TargetError(
                f"{path}: expected a module whose adapter takes part wherever its weight is used, found a {kind} of "
                f"quantized storage, whose codes are read instead ({read.reason}); take it out of the targets, or keep "
                "it out of quantization (llm_int8_skip_modules)"
            )

    def _is_refused(self, path: str, read: Read) -> bool:
        base = base_of(self.tree.modules[path])
        codec = find_codec(base) if read.needs_matrix else None
        return codec is not None and codec.quantizer(base) is not None


def _reads_in(tree: Tree) -> tuple[dict[str, Read], frozenset[str]]:
    """How modules of ``tree`` are read past, and which are asked where they are, each at its first path."""
    notes = _Notes(tree)
    return notes.reads, frozenset(notes.places)


class _Notes:
    """What the code of one module after the other says.

    Attributes:
        reads: how modules are read past, each at its first path.
        places: of those that are asked where they are.
    """

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.reads: dict[str, Read] = {}
        self.places: set[str] = set()
        for path, module in tree.firsts():
            self._note(path, base_of(module))

    def _note(self, path: str, reader: nn.Module) -> None:
        uses = reads_of(reader)
        for below, noted in uses.places.items():
            if any(self._counts(use, reader) for use in noted):
                self.places.update(map(self.tree.first, _matching(self.tree, path, below)))
        for below in dict.fromkeys((*uses.values, *uses.forms)):
            value, written, form, called = (
                any(self._counts(use, reader) for use in noted.get(below, ()))
                for noted in (uses.values, uses.writes, uses.forms, uses.calls)
            )
            for child in _matching(self.tree, path, below) if value or form else ():
                read = Read((type(reader).__name__,), value, written, called or _is_called(self.tree, child))
                first = self.tree.first(child)
                self.reads[first] = _both(self.reads[first], read) if first in self.reads else read

    def _counts(self, use: Use, reader: nn.Module) -> bool:
        return use.happens(reader) and (use.returned_by is None or use.returned_by in self._names)

    @cached_property
    def _names(self) -> frozenset[str]:
        """All names in the code of the tree's modules."""
        kinds: set[Any] = {type(base_of(module)) for module in self.tree.modules.values()}
        return frozenset(name for kind in kinds for name in names_in(kind))


def _is_called(tree: Tree, path: str) -> bool:
    """Whether the module that holds the one at ``path`` calls it, or has no source that could tell."""
    above, _, name = path.rpartition(".")
    parent = base_of(tree.modules[above])
    uses = calls_of(parent)
    calls: Iterable[Use] = (use for one in (name, "*") for use in uses.calls.get((one,), ()))
    return not uses.complete or any(use.happens(parent) for use in calls)


def _both(first: Read, second: Read) -> Read:
    by = tuple(dict.fromkeys((*first.by, *second.by)))
    return Read(by, first.value or second.value, first.written or second.written, first.called or second.called)


def _matching(tree: Tree, path: str, below: Path) -> Iterator[str]:
    """Paths of the modules under ``path`` that ``below`` may mean."""
    if not below:
        return
    paths = [path]
    for name in below:
        steps = ([f"{start}.{n}".lstrip(".") for n in _names(tree, start, name)] for start in paths)
        paths = [p for step in steps for p in step]
    yield from paths


def _names(tree: Tree, path: str, name: str) -> list[str]:
    children = base_of(tree.modules[path])._modules if path in tree.modules else {}
    names = list(children) if name == "*" else [name]
    return [n for n in names if f"{path}.{n}".lstrip(".") in tree.modules]
