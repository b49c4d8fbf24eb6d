"""The way to every combination type, for one module: checks, the type's own function, and how far it went."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...errors import AdapterError
from . import pruning as _pruning  # these two register their types
from . import spectra as _spectra
from .exact import distance
from .records import Branch, Combined
from .registry import Recipe, check_together, check_weights

__all__ = ["combine"]
_REGISTERED = (_pruning, _spectra)


@torch.no_grad()
def combine(branches: Sequence[Branch], weights: Sequence[float], recipe: Recipe, where: str = "combine") -> Combined:
    """One branch in place of several of the same module; nothing that comes in is changed.

    Args:
        branches: at least one, all with the same (out, in).
        weights: one for each, of either sign.
        where: what messages begin with, a module's path say.

    Raises:
        AdapterError: shapes, ranks or numbers of weights that don't fit, NaN or infinite values that come in or, by
            overflow, come out.
    """
    branches = list(branches)
    names = [str(i) for i in range(len(branches))]
    for name, branch in zip(names, branches, strict=True):
        branch.check(f"{where}: adapter {name}")
    check_together(branches, names, recipe.kind, where)
    weights = check_weights(weights, len(branches), where)
    with torch.autocast(branches[0].B.device.type, enabled=False):
        found = recipe.kind.function(branches, weights, recipe)
        if not (torch.isfinite(found.A).all() and torch.isfinite(found.B).all()):
            raise AdapterError(
                f"{where}: expected finite factors from {recipe.combination_type!r}, found an overflow of "
                f"{found.A.dtype}; lower the weights {weights}"
            )
        return dataclasses.replace(found, distance=distance(branches, weights, found))
