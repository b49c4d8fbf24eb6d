"""Ranks that a weight can't have, lowered to what it has.

A branch of zeros may be wider than its weight; one that is found by decomposing the weight can't. Models hold linears
with one output (gates of shared experts, small heads) or a few (routers) beside those for which a rank is meant, so
such a start gets there the rank that there is, as if ``rank_pattern`` had said so. alpha follows, so that the scaling
is the one that the configuration's rule gives all layers: a scaling of alpha / 1 where the others have alpha / 16 would
train that layer sixteen times as fast. Both are written into the configuration, by which PEFT builds the same.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import sqrt
from typing import Any

from ..codecs import codec_for, find_codec
from ..config.lora import LoraConfig
from ..errors import ConfigError
from ..layers import find_layer_family
from ..layers.sharded.sharding import whole_shape
from ..naming import Suffixes, Tree, base_of
from .engine import Plan, PlanEntry, make_plan
from .targets import shortest_names


def capped(tree: Tree, config: LoraConfig, plan: Plan) -> tuple[LoraConfig, Plan]:
    """``config`` and its ``plan`` with no rank above min(out, in) of its weight; themselves where none is.

    Raises:
        ConfigError: no module of the model could have the rank that is asked for.
    """
    least = {entry.path: _most(tree.modules[entry.path]) for entry in plan.entries}
    small = [entry for entry in plan.entries if entry.rank > least[entry.path]]
    if not small:
        return config, plan
    if len(small) == len(plan.entries):
        _check_possible(tree, min(entry.rank for entry in small))
    groups: dict[tuple[int, float], list[str]] = defaultdict(list)
    for entry in small:
        share = least[entry.path] / entry.rank
        alpha = entry.alpha * (sqrt(share) if config.use_rslora else share)
        groups[least[entry.path], alpha] += [entry.path, *entry.aliases]
    targeted = Suffixes(path for entry in plan.entries for path in (entry.path, *entry.aliases))
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for (rank, alpha), paths in groups.items():
        for name in _patterns(paths, tree, targeted):
            ranks[name], alphas[name] = rank, alpha
    config = replace(
        config,
        # The first pattern that fits counts.
        rank_pattern={**ranks, **{k: v for k, v in config.rank_pattern.items() if k not in ranks}},
        alpha_pattern={**alphas, **{k: v for k, v in config.alpha_pattern.items() if k not in alphas}},
    )
    asked = {entry.path: entry.rank for entry in small}
    entries = [replace(entry, asked_rank=asked.get(entry.path)) for entry in make_plan(tree, config).entries]
    return config, replace(plan, entries=tuple(entries))


def lowered(entries: Iterable[PlanEntry]) -> dict[str, int]:
    """The ranks that were asked for, by path, where the weight hasn't as many."""
    return {entry.path: entry.asked_rank for entry in entries if entry.asked_rank is not None}


def _patterns(paths: list[str], tree: Tree, targeted: Suffixes) -> list[str]:
    """Names that mean ``paths`` and none of the other targets; a regular expression where a path ends another."""
    names = shortest_names(paths, tree)
    return [name if set(targeted.of(name)) <= set(paths) else f"^{re.escape(name)}" for name in names]


def _most(module: Any) -> int:
    base = base_of(module)
    return min(whole_shape(base, codec_for(base).shape(base)))


def _check_possible(tree: Tree, rank: int) -> None:
    modules = [base_of(module) for path, module in tree.modules.items() if path]
    most = max(_most(m) for m in modules if find_codec(m) is not None and find_layer_family(m) is not None)
    if rank > most:
        raise ConfigError(
            f"r: expected a rank of at most {most}, which is the largest that a module of this model has, found "
            f"{rank}; lower r"
        )
