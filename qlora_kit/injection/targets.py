"""From what a configuration says to an exact list of modules.

A model is looked at as its user knows it: a module already adapted, or copied for ``modules_to_save``, counts
as the one module it stands for, so a second adapter resolves exactly as the first did. Names match whole
components at the end of a path (``q_proj``, ``0.self_attn.q_proj``; never a part of a name), a regular
expression matches the whole path. Whatever matches nothing is an error with the closest real names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..codecs import codec_for
from ..config.lora import LoraConfig
from ..errors import TargetError, closest
from ..layers import layer_family_for, parts_to_save
from ..naming import Expression, Patterns, Suffixes, Tree, base_of, pattern_value
from .adaptable import adaptable, is_linear, refused
from .architectures import default_targets
from .heads import head_of_task, new_head, output_table, saved_names
from .hybrids import of_bare_layers
from .read_past import ReadPast
from .ties import ties_among


@dataclass(frozen=True)
class Target:
    """One module to adapt: its path, the paths where the same object stands again, rank and alpha, and the path of the
    module whose factors it shares, if it does."""

    path: str
    aliases: tuple[str, ...]
    rank: int
    alpha: float
    tied_to: str = ""


def resolve(model: nn.Module | Tree, config: LoraConfig) -> list[Target]:
    """The modules that ``config`` selects in ``model``, in the model's order.

    Raises:
        TargetError: a name, regex, layer index, exclusion or pattern matches nothing; or a weight of few bits whose
            codes the model reads past the module.
        UnsupportedModuleError: a selected module's type can't be adapted; names path and type.
    """
    tree = Tree.of(model)
    candidates = _candidates(tree, config)
    selected = _select(tree, config, candidates)
    selected = _only_layers(selected, config)
    selected = _without_excluded(selected, config, tree)
    if not selected:
        raise TargetError("layers_to_transform and exclude_modules leave no module to adapt; loosen one of them")
    _check_patterns(selected, config)
    ties = ties_among(tree, selected) if config.ensure_weight_tying else {}
    together = {*selected, *ties, *ties.values()}
    selected = [path for path in candidates if path in together]

    ranks, alphas, past = Patterns(config.rank_pattern), Patterns(config.alpha_pattern), ReadPast(tree)
    targets: dict[int, Target] = {}
    for path in selected:
        module = base_of(tree.modules[path])
        codec_for(module, path)
        layer_family_for(module, path)
        past.check(path)
        if (first := targets.get(id(module))) is not None:
            targets[id(module)] = Target(first.path, (*first.aliases, path), first.rank, first.alpha)
        else:
            named = ties.get(path, path)
            rank, alpha = ranks.value(named, config.r), alphas.value(named, config.lora_alpha)
            targets[id(module)] = Target(path, (), rank, alpha, ties.get(path, ""))
    return list(targets.values())


def without_idle(model: nn.Module | Tree, config: LoraConfig) -> LoraConfig:
    """``config`` without what selects nothing in ``model``, which ``resolve`` takes for a mistake: for configurations
    that were right elsewhere.

    Raises:
        TargetError: no target is left, or no layer: these would select other modules were they left out.
    """
    tree = Tree.of(model)
    candidates = _candidates(tree, config)
    changes: dict[str, Any] = {}
    if isinstance(names := config.target_modules, (list, set)):
        live = [name for name in names if any(path in candidates for path in tree.names.of(name))]
        changes["target_modules"] = live or names
    if isinstance(excluded := config.exclude_modules, str):
        changes["exclude_modules"] = excluded if _some(excluded, tree.modules) else None
    else:
        changes["exclude_modules"] = [name for name in excluded or () if name in tree.names] or None
    config = replace(config, **changes)
    selected = _select(tree, config, candidates)
    wanted = config.layers_to_transform
    if wanted is not None and _whole_paths(config).issuperset(selected):
        config = replace(config, layers_to_transform=None, layers_pattern=None)
    elif isinstance(wanted, list):
        patterns = _layer_patterns(config)
        there = {_layer_of(path, patterns) for path in selected}
        config = replace(config, layers_to_transform=[index for index in wanted if index in there] or wanted)
    selected = _without_excluded(_only_layers(selected, config), config, tree)
    known = Suffixes(selected if config.rank_pattern or config.alpha_pattern else ())
    return replace(
        config,
        rank_pattern={key: rank for key, rank in config.rank_pattern.items() if _is_live(key, known)},
        alpha_pattern={key: alpha for key, alpha in config.alpha_pattern.items() if _is_live(key, known)},
    )


def resolve_saved(model: nn.Module | Tree, names: Sequence[str] | None, *, tied: bool = False) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, without those inside another, which are trained with it;
    every name must match. With ``tied`` also of those that share a copy with one of them, see ``ties``."""
    if not names:
        return []
    tree = Tree.of(model)
    for name in names:
        _must_match("modules_to_save", name, name in tree.names, tree.modules)
    paths = tree.names.matching(names)
    inside = tuple(f"{path}." for path in paths)
    paths = [path for path in paths if not path.startswith(inside)]
    paths = [
        part
        for path in paths
        for module in [tree.modules[path]]
        for part in parts_to_save(module, path, whole=len(tree.paths_of(module)) > 1)
    ]
    ties = ties_among(tree, paths) if tied else {}
    return list(dict.fromkeys([*ties.values(), *paths, *ties]))


def shortest_names(paths: Iterable[str], model: nn.Module | Tree) -> list[str]:
    """The fewest and shortest names that select exactly ``paths``: what an adapter file should say."""
    wanted = set(paths)
    return sorted(Suffixes(path for path in Tree.of(model).modules if path and path not in wanted).apart(wanted))


def _candidates(tree: Tree, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that may be adapted: all but those trained whole, and what is inside of them."""
    saved = set(tree.names.matching(saved_names(tree, config)))
    if config.ensure_weight_tying and (ties := ties_among(tree, saved)):
        saved |= {*ties, *ties.values()}
    inside_saved = tuple(f"{path}." for path in saved)
    return {
        path: module
        for path, module in tree.modules.items()
        if path and path not in saved and not path.startswith(inside_saved or "\0")
    }


def _select(tree: Tree, config: LoraConfig, candidates: dict[str, nn.Module]) -> list[str]:
    names: Any = config.target_modules
    if names is None:
        return _usual(tree, candidates)
    if names == "all-linear":
        chosen = all_linear(tree, candidates)
        if not chosen:
            raise TargetError(
                "target_modules='all-linear': the model has no linear module besides its head that can be adapted; "
                "name others, convolutions say, in target_modules"
            )
        return chosen
    if isinstance(names, str):
        expression = Expression(names, "target_modules")
        chosen = [path for path in candidates if expression.fullmatch(path)]
        if not chosen:
            if advice := _meant_by(names, candidates):
                raise TargetError(
                    f'target_modules={names!r}: expected a list of names, "all-linear", or a regular expression of '
                    f"whole module paths (they look like {_example(candidates)!r}), found a text that is none; pass "
                    f"{advice}"
                )
            near = closest(re.sub(r"[\\^$.*+?()\[\]{}|]+", " ", names), _names_of(candidates))
            raise TargetError(
                f"target_modules={names!r}: the regular expression matches no whole module path; closest names: "
                f"{near or sorted(_names_of(candidates))[:5]} (paths look like {_example(candidates)!r})"
            )
        return chosen
    brought = set(tree.names.matching(head_of_task(tree, config.task_type)))
    within = tuple(f"{path}." for path in brought) or ("\0",)
    # Naming the head that the task trains whole asks for no more than that, as in PEFT.
    for name in sorted(names) if isinstance(names, set) else names:
        found = any(path in candidates or f"{path}.".startswith(within) for path in tree.names.of(name))
        _must_match("target_modules", name, found, candidates)
    if not (chosen := [path for path in tree.names.matching(names) if path in candidates]):
        raise TargetError(
            f"target_modules={names!r}: expected modules besides the head, found {sorted(brought)} alone, which "
            f"task_type={config.task_type!r} trains whole; name others, or 'all-linear'"
        )
    return chosen


def all_linear(tree: Tree, candidates: Iterable[str]) -> list[str]:
    """Those of ``candidates`` that are linear layers an adapter can be put on, and neither a head nor in one."""
    aside, without = tuple(f"{path}." for path in (*new_head(tree), *output_table(tree))), refused(tree)
    linears = (path for path in candidates if is_linear(tree.modules[path]) and path not in without)
    return [path for path in linears if not f"{path}.".startswith(aside or "\0")]


def _usual(tree: Tree, candidates: dict[str, nn.Module]) -> list[str]:
    """The architecture's usual targets, and in layers that have none of them what stands in their place."""
    leaves = {path.rpartition(".")[2] for path, module in candidates.items() if adaptable(module)}
    model_type = getattr(getattr(tree.modules[""], "config", None), "model_type", None)
    names = default_targets(model_type, leaves)
    if names is None:
        raise TargetError(
            f"target_modules=None: expected a known architecture, found model_type={model_type!r}; set "
            f"target_modules to 'all-linear' or to some of {sorted(leaves)}"
        )
    without = refused(tree)
    chosen = [path for path in tree.names.matching(names) if path in candidates and path not in without]
    if not chosen:
        _must_match("target_modules", names[0], False, candidates)
    found = {*chosen, *of_bare_layers(tree, chosen, all_linear(tree, candidates))}
    return [path for path in candidates if path in found]


def _only_layers(selected: list[str], config: LoraConfig) -> list[str]:
    if config.layers_to_transform is None:
        return selected
    wanted = config.layers_to_transform
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    patterns = _layer_patterns(config)
    found = {path: index for path in selected if (index := _layer_of(path, patterns)) is not None}
    missing = indices - set(found.values())
    if missing:
        raise TargetError(
            f"layers_to_transform: no selected module in layer(s) {sorted(missing)}; the selected modules are in "
            f"layers {sorted(set(found.values()))} (layers_pattern={config.layers_pattern!r})"
        )
    whole = _whole_paths(config)
    return [path for path in selected if path in whole or found.get(path) in indices]


def _whole_paths(config: LoraConfig) -> set[str]:
    """Targets that may be whole paths, such as "lm_head": these say themselves which layer they mean, as in PEFT."""
    return set(config.target_modules) if isinstance(config.target_modules, (list, set)) else set()


def _layer_patterns(config: LoraConfig) -> list[Expression]:
    """For ``_layer_of``: what leads to a layer's index, for each of ``layers_pattern``."""
    given = config.layers_pattern
    names = [given] if isinstance(given, str) else given or [r"[^.]+"]
    return [Expression(rf"(?:^|.*?\.)(?:{name})\.(\d+)(?:\.|$)", "layers_pattern") for name in names]


def _layer_of(path: str, patterns: Sequence[Expression]) -> int | None:
    """The layer that ``path`` lies in: the first index on the way to it, as in PEFT, since what is numbered further
    inside (experts, branches) belongs to a layer. With ``patterns`` the first index after the first of them that is
    on the way."""
    for pattern in patterns:
        if (index := pattern.group(path)) is not None:
            return int(index)
    return None


def _some(expression: str, paths: Iterable[str]) -> bool:
    return any(map(Expression(expression, "exclude_modules").fullmatch, paths))


def _without_excluded(selected: list[str], config: LoraConfig, tree: Tree) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return selected
    if isinstance(excluded, str):
        expression = Expression(excluded, "exclude_modules")
        _must_match("exclude_modules", excluded, any(map(expression.fullmatch, tree.modules)), tree.modules)
    else:
        for name in excluded:
            _must_match("exclude_modules", name, name in tree.names, tree.modules)
    without = set(named(tree, excluded))
    return [path for path in selected if path not in without]


def named(tree: Tree, names: list[str] | str | None) -> list[str]:
    """Paths of all modules that ``names``, or a regular expression, means."""
    if isinstance(names, str):
        return list(filter(Expression(names, "exclude_modules").fullmatch, tree.modules))
    return tree.names.matching(names or ())


def _check_patterns(selected: list[str], config: LoraConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(config, field):
            known = Suffixes(selected)
            for pattern in patterns:
                _must_match(field, pattern, _is_live(pattern, known), selected)


def _is_live(pattern: str, selected: Suffixes) -> bool:
    """Whether a rank's or an alpha's ``pattern`` fits one of the ``selected`` paths."""
    return pattern in selected or any(pattern_value(path, {pattern: True}, False) for path in selected.paths)


def _meant_by(text: str, candidates: Iterable[str]) -> str | None:
    """What to pass in the place of a text that matches no path, where what it means is plain."""
    if re.sub(r"[\W_]+", "-", text.strip().lower()) in ("all-linear", "all-linears", "all", "linear", "alllinear"):
        return 'target_modules="all-linear"'
    names = [name for name in re.split(r"[\s,|]+", text) if name]
    return f"target_modules={names!r}" if names and set(names) <= _names_of(candidates) else None


def _names_of(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths} | {path for path in paths if path}


def _example(candidates: dict[str, nn.Module]) -> str:
    return next((path for path, module in candidates.items() if adaptable(module)), "")


def _must_match(field: str, name: str, matched: bool, paths: Iterable[str]) -> None:
    if not matched:
        names = _names_of(paths)
        near = closest(name, names) or sorted(n for n in names if n)[:5]
        raise TargetError(f"{field}: {name!r} matches no module of the model; closest names: {near}")
