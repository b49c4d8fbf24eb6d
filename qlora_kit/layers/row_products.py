"""What layers compute for rows with adapters of their own.

The base is computed once for all rows, and each adapter's branch once, for the rows that are its own, and added to
these in place. So four adapters in a batch cost the products of one, and no adapter's numbers meet another's rows: were
all factors one matrix, and what isn't a row's own masked out, a NaN of one would be everybody's. Where as many rows go
through each, a family may compute its branches in one batched product, whose parts don't meet either.

A trained copy of a module is called with the rows that are its adapter's; what the copies give is put together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import AdapterError
from .row_choice import in_rows, left_to_python, rows_of
from .rows import BASE, KEYWORD, Rows, Where
from .weight_in_effect import Sum, weight_in_effect

__all__ = ["call_by_rows", "forward_by_rows", "no_one_weight", "rows_of", "weight_by_rows"]

_PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))


def add_branches_(result: Tensor, x: Tensor, groups: Mapping[str, Where], layer: Any) -> Tensor:
    """Add to ``result`` (rows, ...) at each adapter's places what its branch of ``layer`` gives for those of ``x``
    (rows, ...); to those of ``BASE`` nothing."""
    for name, where in groups.items():
        if name != BASE:
            _add_(result, where, layer.branch(_picked(x, where), name))
    return result


def _picked(x: Tensor, where: Where) -> Tensor:
    return x[where] if isinstance(where, slice) else x.index_select(0, where)


def _add_(result: Tensor, where: Where, part: Tensor, scale: float = 1.0) -> None:
    part = part.to(result.dtype)
    if isinstance(where, slice):
        result[where].add_(part, alpha=scale)
    else:
        result.index_add_(0, where, part, alpha=scale)


@left_to_python
def forward_by_rows(layer: Any, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What the adapter layer ``layer`` gives for ``x`` (rows, ...), each row with its own adapter.

    Raises:
        AdapterError: something is merged into its weight; or see ``Rows.where``.
    """
    if layer.merged_adapters:
        raise AdapterError(
            f"{rows.path_of(layer)}: expected no adapter in the base weight for {KEYWORD}, found "
            f"{layer.merged_adapters} merged into it; call unmerge_adapter() first"
        )
    groups = rows.where(layer, x, () if layer.disable_adapters else layer.r)
    result = layer.codec.forward(layer.base_layer, x, *args, **kwargs)
    if (even := rows.side_by_side(groups)) is not None and (factors := layer.stacked_factors(even.names)) is not None:
        own = _picked(x, even.where)
        part, scale = layer.stacked_branches(own.reshape(len(even.names), -1, own.shape[-1]), *factors)
        _add_(result, even.where, part.view(*own.shape[:-1], -1), scale)
        return result
    return add_branches_(result, x, groups, layer)


def weight_by_rows(layer: Any, rows: Rows) -> Tensor:
    """The weight that the adapter layer ``layer`` computes with, if all rows have one; see ``weight_in_effect``."""
    own = set(rows.own(() if layer.disable_adapters or layer.merged_adapters else layer.r))
    branches = [(*layer.factors(name), layer.scaling[name]) for name in sorted(own - {BASE})]
    unknown = "" if len(own) == 1 else no_one_weight(rows, layer)
    base = layer.base_layer
    return weight_in_effect(Sum(layer.codec, base, base.weight, branches, layer._rescale_, unknown))


def no_one_weight(rows: Rows, layer: Any) -> str:
    """What to say where a weight is read of a module that has another for each row."""
    return (
        f"{rows.path_of(layer)}: its weight is read past the module, where rows of {KEYWORD} have different ones; call "
        "set_adapter(name) and run the rows of each adapter by themselves"
    )


@left_to_python
def call_by_rows(
    layer: Any, rows: Rows, call: Callable[[str, Any, Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What ``call(name, args, kwargs)`` gives for the rows of each copy that ``layer`` has, ``BASE`` its original, put
    together. Tensors as long as the first have a row's part at its place, others are everybody's.

    Raises:
        AdapterError: arguments or results can't be taken apart by rows; or see ``Rows.where``.
    """
    held = [] if layer.disable_adapters else layer.adapter_names()
    leaves, form = tree_flatten((args, kwargs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    groups = dict.fromkeys(rows.own(held), slice(None)) if first is None else rows.where(layer, first, held)
    if len(groups) == 1:
        with in_rows(rows):
            return call(next(iter(groups)), args, kwargs)
    strange = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
    if first is None or strange:
        found = f"a {strange[0]}" if strange else "no tensor"
        raise AdapterError(_not_by_rows(rows, layer, f"{found} among its arguments"))
    repeats, results = rows.repeats(layer, first), []
    for name, where in groups.items():
        own = tree_unflatten([_part(leaf, where, len(first)) for leaf in leaves], form)
        with in_rows(rows.at(where, repeats)):
            results.append(call(name, *own))
    places = [torch.arange(len(first), device=first.device)[where] for where in groups.values()]
    try:
        return tree_map(functools.partial(_together, places), *results)
    except ValueError as error:  # a result isn't by rows, or they are of different kinds
        raise AdapterError(_not_by_rows(rows, layer, str(error))) from None


def _together(places: Sequence[Tensor], *parts: Any) -> Any:
    """``parts`` of a result, each at its ``places``."""
    if not isinstance(parts[0], Tensor):
        return parts[0]
    if any(part.shape[:1] != place.shape for part, place in zip(parts, places, strict=True)):
        raise ValueError(f"results of shapes {[tuple(part.shape) for part in parts]}")
    return torch.cat(parts).index_select(0, torch.cat(tuple(places)).argsort())


def _part(leaf: Any, where: Where, rows: int) -> Any:
    return leaf[where] if isinstance(leaf, Tensor) and leaf.shape[:1] == (rows,) else leaf


def _not_by_rows(rows: Rows, layer: Any, found: str) -> str:
    return (
        f"{rows.path_of(layer)}: expected a module that can be called with some of the rows, for {KEYWORD} of adapters "
        f"that have trained copies of it, found {found}; call set_adapter(name) and run the rows of each adapter by "
        "themselves"
    )
