"""Which modules' outputs are added to a stream that goes through a block, as attention's and a feed-forward's last
layers' are, and where that stream is given to a module just before.

Nothing is known of the model's source. While a forward runs, some rows of what modules are given and give are
remembered, until their block is left; where a module's output plus what an earlier one was given is, bit for bit, what
a later one is given or the block returns, the earlier one is given the stream. A block that does more than add, with a
norm or a factor on what comes back or two branches added at once, shows no such sum, and nothing is said of it. Of one
row of text alone, modules that have tokens before rows are given the same as those that have rows before tokens: it
takes two rows to see that these don't add up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from qlora_kit.naming import Tree

from .moments import inputs_of

# Rows that are compared, at most; from all over, since those at either end may be padding, and 0.
_TELLING = 16
# The shape of all rows, and where they lie.
_Kind = tuple[torch.Size, torch.device]


@contextmanager
def additions_in(model: nn.Module, blocks: Mapping[str, Collection[str]]) -> Iterator[dict[str, str]]:
    """Inside the block, a forward of ``model`` fills in, for those modules in ``blocks`` whose output is added to a
    stream, the path of the module that is given the stream as it was before.

    Args:
        blocks: modules of interest by the path of the block that holds them.
    """
    found: dict[str, str] = {}
    modules, records = Tree(model).modules, {block: _Record() for block in blocks}
    inside = {path: records[block] for path in modules if (block := _holder(path, records)) is not None}
    with ExitStack() as stack:
        stack.enter_context(inputs_of(model, inside, lambda path, value: inside[path].give(path, value)))
        for block, paths in blocks.items():
            for path in inside.keys() & paths:

                def made(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    inside[path].make(path, output)

                stack.callback(modules[path].register_forward_hook(made).remove)

            def leave(module: nn.Module, args: Any, output: Any, record: _Record = records[block]) -> None:
                found.update(record.streams(output))
                record.clear()

            stack.callback(modules[block].register_forward_hook(leave).remove)
        yield found


def _holder(path: str, blocks: Container[str]) -> str | None:
    """The one of ``blocks`` that holds the module at ``path``, None if none does."""
    while path:
        path = path.rpartition(".")[0]
        if path in blocks:
            return path
    return None


class _Record:
    """What went in and out of modules of a block, in the order of a forward: some rows, and of how many."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._given: list[tuple[str, Tensor, _Kind]] = []
        # By module, how many inputs came before its own, and before its output.
        self._since: dict[str, int] = {}
        self._made: dict[str, tuple[int, Tensor, _Kind]] = {}
        self._calls: Counter[str] = Counter()

    def give(self, path: str, value: Any) -> None:
        self._calls[path] += 1
        self._since[path] = len(self._given)
        self._given += [(path, *rows) for rows in _some_rows(value)]

    def make(self, path: str, value: Any) -> None:
        for rows in _some_rows(value):
            self._made[path] = len(self._given), *rows

    def streams(self, output: Any) -> dict[str, str]:
        """By module, the one that is given the stream: of several the last before it."""
        ends = [("", *rows) for value in tree_leaves(output) for rows in _some_rows(value)]
        found = {}
        for path, (time, own, kind) in self._made.items():
            if self._calls[path] != 1:
                continue
            before = [(at, rows) for at, rows, of in self._given[: self._since[path]] if of == kind]
            after = [rows for _, rows, of in [*self._given[time:], *ends] if of == kind]
            streams = (at for at, rows in reversed(before) if self._calls[at] == 1 and _adds_up(rows, own, after))
            if (stream := next(streams, None)) is not None:
                found[path] = stream
        return found


def _adds_up(rows: Tensor, own: Tensor, totals: list[Tensor]) -> bool:
    """Whether the sum is among ``totals``, and shows both: what is too small to show could be added to anything."""
    total = rows + own
    shows = not torch.equal(total, rows) and not torch.equal(total, own)
    return shows and any(torch.equal(total, other) for other in totals)


def _some_rows(value: Any) -> Iterator[tuple[Tensor, _Kind]]:
    """Copies, since what comes after may work in place; nothing of what isn't rows."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1 and value.numel():
        rows = value.detach().reshape(-1, value.shape[-1])
        yield rows[:: -(-len(rows) // _TELLING)].clone(), (rows.shape, value.device)
