"""Combining whole adapters: every module that any of them adapts, all checked before the first is computed.

An adapter that a module lacks is left out there, which is the same as a branch of zeros. Weights may differ from
module to module: a mapping from a module's path, its last components or a regular expression, first match wins, or a
function of the path.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import AdapterError, closest
from ...naming import pattern_value
from .combination import combine
from .records import FILLED_UP, Branch, Combined, one_rank
from .registry import Recipe, check_together, check_weights

#: One weight an adapter, for all modules or by module.
Weights = Sequence[float] | Mapping[str, Sequence[float]] | Callable[[str], Sequence[float]]


@dataclass(frozen=True)
class LayerCombination:
    """One module's numbers; see ``Combined``.

    Attributes:
        adapters: those that this module has. weights: theirs.
        ranks: of the sources. rank: of the result.
    """

    path: str
    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    ranks: tuple[int, ...]
    rank: int
    captured: float
    error: float
    distance: float


@dataclass(frozen=True)
class CombineReport:
    """What combining did, module by module. ``str(report)`` is a table, ``to_dict()`` plain data."""

    combination_type: str
    adapters: tuple[str, ...]
    layers: tuple[LayerCombination, ...]
    copied: dict[str, str] = field(default_factory=dict)  # modules trained whole, and the adapter each is from
    filled_to: int | None = None  # the rank that all factors were given by zeros, if they had several

    def mean(self, attribute: str) -> float:
        """The mean of a ``LayerCombination`` attribute over the modules."""
        return sum(getattr(layer, attribute) for layer in self.layers) / max(1, len(self.layers))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(layer.path) for layer in self.layers] + [6])
        lines = [f"{'module':{width}}  {'ranks':>12} {'rank':>5} {'captured':>9} {'error':>9} {'from sum':>9}"]
        lines += [
            f"{layer.path:{width}}  {'+'.join(map(str, layer.ranks)):>12} {layer.rank:>5} {layer.captured:>9.4%} "
            f"{layer.error:>9.2e} {layer.distance:>9.2e}"
            for layer in self.layers
        ]
        lines += [f"{path:{width}}  copied whole from {name}" for path, name in self.copied.items()]
        if self.filled_to is not None:
            lines.append(FILLED_UP.format(self.filled_to))
        lines.append(
            f"{len(self.layers)} modules, {self.combination_type} of {', '.join(self.adapters)}: mean captured "
            f"{self.mean('captured'):.4%}, mean error {self.mean('error'):.2e}, mean distance from the weighted sum "
            f"{self.mean('distance'):.2e}"
        )
        return "\n".join(lines)


def combine_layers(
    layers: Mapping[str, Mapping[int, Branch]],
    names: Sequence[str],
    weights: Weights,
    recipe: Recipe,
    *,
    own_ranks: bool = False,
) -> tuple[dict[str, Combined], CombineReport]:
    """Combine adapters module by module.

    Args:
        layers: for each module's path its branches, by their adapter's place in ``names``.
        names: of the adapters, for messages and the report.
        weights: one for each of ``names``; or those by module.
        own_ranks: leave each result its rank; see ``records.one_rank`` for what they get otherwise.

    Returns:
        The result of each module, and the account of all of them.

    Raises:
        AdapterError: no adapter, weights that don't fit, branches that can't be combined or aren't finite; before
            anything is computed, and names the module.
    """
    if not names or not layers:
        raise AdapterError(f"adapters: expected at least one adapter with modules to combine, found {list(names)}")
    chosen = _by_layer(weights, list(layers), len(names))
    for path, branches in layers.items():
        for i, branch in branches.items():
            branch.check(f"{path}: adapter {names[i]!r}")
        check_together(list(branches.values()), [names[i] for i in branches], recipe.kind, path)
    if recipe.kind.largest_rank and recipe.rank is None and recipe.energy is None:
        largest = max(branch.rank for branches in layers.values() for branch in branches.values())
        recipe = dataclasses.replace(recipe, rank=largest)
    results, lines = {}, []
    for path, branches in layers.items():
        used = [chosen[path][i] for i in branches]
        found = combine(list(branches.values()), used, recipe.for_layer(path), path)
        results[path] = found
        lines.append(
            LayerCombination(
                path=path,
                adapters=tuple(names[i] for i in branches),
                weights=tuple(used),
                ranks=tuple(branch.rank for branch in branches.values()),
                rank=found.rank,
                captured=found.captured,
                error=found.error,
                distance=found.distance,
            )
        )
    several = len({found.rank for found in results.values()}) > 1
    if several and not own_ranks:
        wide = one_rank({path: (found.A, found.B) for path, found in results.items()})
        results = {
            path: dataclasses.replace(found, A=wide[path][0], B=wide[path][1]) for path, found in results.items()
        }
    filled_to = next(iter(results.values())).rank if several and not own_ranks else None
    return results, CombineReport(recipe.combination_type, tuple(names), tuple(lines), filled_to=filled_to)


def _by_layer(weights: Weights, paths: Sequence[str], count: int) -> dict[str, list[float]]:
    """The weights of each module, checked."""
    if isinstance(weights, Mapping):
        for key in weights:
            if not any(pattern_value(path, {key: True}, False) for path in paths):
                raise AdapterError(
                    f"weights: expected paths, ends of paths or regular expressions of adapted modules, found {key!r}, "
                    f"which matches none; closest: {closest(key, paths) or list(paths)[:3]}"
                )
        entries = dict(weights)
        none: Sequence[float] = ()
        found = {path: pattern_value(path, entries, none) for path in paths}
        if left := [path for path, value in found.items() if value is none]:
            raise AdapterError(
                f"weights: expected an entry for every adapted module, found none for {left[:3]}; add one, or '.*' as "
                "the last for all others"
            )
    else:
        found = {path: weights(path) if callable(weights) else weights for path in paths}
    return {path: check_weights(value, count, f"{path}: weights") for path, value in found.items()}
