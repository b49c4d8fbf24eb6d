"""A model's fused linears opened for adapters on their parts, where a configuration names parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...config.lora import LoraConfig
from ...errors import AdapterError
from ...layers.sharded.megatron.parts import NAMES, PARTS, FusedLinear, rows_of_parts
from ...layers.sharded.megatron.types import is_known
from ...naming import Expression, StandIn, Tree, ends_with

_PARENTS = frozenset({"SelfAttention", "MLP"})


@contextmanager
def opened_parts(model: nn.Module, config: LoraConfig, *, keep: bool = True) -> Iterator[None]:
    """In the block, and with ``keep`` after it, the fused linears whose parts ``config`` names stand with these under
    their paths; on an error they are as they were.

    Raises:
        AdapterError: one of them has an adapter as a whole.
        TargetError: see ``rows_of_parts``.
    """
    undo: list[Callable[[], None]] = []
    try:
        if (named := _naming(config)) is not None:
            _open_(Tree(model), named, undo)
        yield
        undo = [] if keep else undo
    finally:
        for step in reversed(undo):
            step()


def _naming(config: LoraConfig) -> Callable[[str], bool] | None:
    """Whether a path is one that ``config`` means; None where it can mean no part."""
    names: Any = config.target_modules
    if isinstance(names, str):
        expression = Expression(names, "target_modules") if re.search(r"linear_|\\w|\[|\.[*+]", names) else None
        return None if expression is None else lambda path: bool(expression.fullmatch(path))
    meant = [name for name in names or () if name.rpartition(".")[2] in NAMES]
    return (lambda path: any(ends_with(path, name) for name in meant)) if meant else None


def _open_(tree: Tree, named: Callable[[str], bool], undo: list[Callable[[], None]]) -> None:
    for path, parent in tree.firsts():
        if not is_known(type(parent), _PARENTS):
            continue
        for child, names in PARTS.items():
            fused = parent._modules.get(child)
            below = f"{path}.{child}".lstrip(".")
            if fused is None or isinstance(fused, FusedLinear) or not any(named(f"{below}.{n}") for n in names):
                continue
            if not (rows := rows_of_parts(parent, child)):
                continue
            if isinstance(fused, StandIn):
                raise AdapterError(
                    f"{below}: expected a fused linear without adapters to put some on its parts, found one on all; "
                    f"name {child!r} again, or delete that adapter first"
                )
            parent._modules[child] = FusedLinear(fused, rows)
            undo.append(lambda parent=parent, child=child, fused=fused: parent._modules.update({child: fused}))  # type: ignore[misc]
