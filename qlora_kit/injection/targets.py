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

from ..codecs import codec_for, find_codec
from ..config.lora import LoraConfig
from ..errors import TargetError, closest
from ..layers import LinearAdapter, find_layer_family, layer_family_for
from ..naming import Expression, Patterns, Suffixes, Tree, base_of, pattern_value, unwrapped
from ..naming.suffixes import suffixes
from .architectures import default_targets
from .read_past import ReadPast


@dataclass(frozen=True)
class Target:
    """One module to adapt: its path, the paths where the same object stands again, rank and alpha."""

    path: str
    aliases: tuple[str, ...]
    rank: int
    alpha: float


def resolve(model: nn.Module | Tree, config: LoraConfig) -> list[Target]:
    """The modules that ``config`` selects in ``model``, in the model's order.

    Raises:
        TargetError: a name, regex, layer index, exclusion or pattern matches nothing; a tied weight, or one of few bits
            whose codes the model reads past the module.
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
    _check_tied(tree, selected)

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
            rank, alpha = ranks.value(path, config.r), alphas.value(path, config.lora_alpha)
            targets[id(module)] = Target(path, (), rank, alpha)
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
    if isinstance(names := config.target_modules, list):
        live = [name for name in names if any(path in candidates for path in tree.names.of(name))]
        changes["target_modules"] = live or names
    if isinstance(excluded := config.exclude_modules, str):
        changes["exclude_modules"] = excluded if _some(excluded, tree.modules) else None
    else:
        changes["exclude_modules"] = [name for name in excluded or () if name in tree.names] or None
    config = replace(config, **changes)
    selected = _select(tree, config, candidates)
    if isinstance(wanted := config.layers_to_transform, list):
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


def resolve_saved(model: nn.Module | Tree, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names, without those inside another, which are trained with it;
    every name must match."""
    if not names:
        return []
    tree = Tree.of(model)
    for name in names:
        _must_match("modules_to_save", name, name in tree.names, tree.modules)
    paths = tree.names.matching(names)
    inside = tuple(f"{path}." for path in paths)
    paths = [path for path in paths if not path.startswith(inside)]
    _check_tied(tree, paths)
    return paths


def shortest_names(paths: Iterable[str], model: nn.Module | Tree) -> list[str]:
    """The fewest and shortest names that select exactly ``paths``: what an adapter file should say."""
    wanted = set(paths)
    others = Suffixes(path for path in Tree.of(model).modules if path and path not in wanted)
    return sorted({next((name for name in suffixes(path) if name not in others), path) for path in sorted(wanted)})


def end_tables(model: nn.Module) -> list[nn.Module | None]:
    """The modules of words at both ends of ``model``, as transformers tells them: embedding and head."""
    found: list[nn.Module | None] = []
    for end in ("input", "output"):
        try:
            table = getattr(unwrapped(model), f"get_{end}_embeddings", lambda: None)()
        except NotImplementedError:  # a model without any says so in this way
            table = None
        found.append(None if table is None else unwrapped(table))
    return found


def _candidates(tree: Tree, config: LoraConfig) -> dict[str, nn.Module]:
    """The modules that may be adapted: all but those trained whole, and what is inside of them."""
    saved = set(tree.names.matching(config.modules_to_save or ()))
    inside_saved = tuple(f"{path}." for path in saved)
    return {
        path: module
        for path, module in tree.modules.items()
        if path and path not in saved and not path.startswith(inside_saved or "\0")
    }


def _adaptable(module: nn.Module) -> bool:
    base = base_of(module)
    return find_codec(base) is not None and find_layer_family(base) is not None


def _select(tree: Tree, config: LoraConfig, candidates: dict[str, nn.Module]) -> list[str]:
    names: Any = config.target_modules
    if names is None:
        leaves = {path.rpartition(".")[2] for path, module in candidates.items() if _adaptable(module)}
        model_type = getattr(getattr(tree.model, "config", None), "model_type", None)
        names = default_targets(model_type, leaves)
        if names is None:
            raise TargetError(
                f"target_modules=None: expected a known architecture, found model_type={model_type!r}; set "
                f"target_modules to 'all-linear' or to some of {sorted(leaves)}"
            )
        names = [name for name in names if name in tree.names] or list(names)
    if names == "all-linear":
        heads, aside = _heads(unwrapped(tree.model)), ReadPast(tree).left_out()
        chosen = [
            path
            for path, module in candidates.items()
            if _adaptable(module)
            and issubclass(find_layer_family(base_of(module)) or nn.Module, LinearAdapter)
            and id(base_of(module)) not in heads
            and path not in aside
        ]
        if not chosen:
            raise TargetError("target_modules='all-linear': the model has no linear module besides its output head")
        return chosen
    if isinstance(names, str):
        expression = Expression(names, "target_modules")
        chosen = [path for path in candidates if expression.fullmatch(path)]
        if not chosen:
            near = closest(re.sub(r"[\\^$.*+?()\[\]{}|]+", " ", names), _names_of(candidates))
            raise TargetError(
                f"target_modules={names!r}: the regular expression matches no whole module path; closest names: "
                f"{near or sorted(_names_of(candidates))[:5]} (paths look like {_example(candidates)!r})"
            )
        return chosen
    for name in names:
        _must_match("target_modules", name, any(path in candidates for path in tree.names.of(name)), candidates)
    return [path for path in tree.names.matching(names) if path in candidates]


def _heads(model: nn.Module) -> set[int]:
    """ids of the output head: the output embeddings, and linears that stand directly at a model's root
    beside its backbone (classification and regression heads)."""
    heads = set()
    if (head := end_tables(model)[1]) is not None:
        heads.add(id(base_of(head)))
    if getattr(model, "base_model_prefix", "") and getattr(model, "base_model", model) is not model:
        heads |= {id(base_of(child)) for child in model._modules.values() if child is not None and _adaptable(child)}
    return heads


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
    return [path for path, index in found.items() if index in indices]


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
        return [path for path in selected if not expression.fullmatch(path)]
    for name in excluded:
        _must_match("exclude_modules", name, name in tree.names, tree.modules)
    without = set(tree.names.matching(excluded))
    return [path for path in selected if path not in without]


def _check_patterns(selected: list[str], config: LoraConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        if patterns := getattr(config, field):
            known = Suffixes(selected)
            for pattern in patterns:
                _must_match(field, pattern, _is_live(pattern, known), selected)


def _is_live(pattern: str, selected: Suffixes) -> bool:
    """Whether a rank's or an alpha's ``pattern`` fits one of the ``selected`` paths."""
    return pattern in selected or any(pattern_value(path, {pattern: True}, False) for path in selected.paths)


def _check_tied(tree: Tree, selected: list[str]) -> None:
    """Refuse a module whose weight another module holds too: the delta would reach only one of them."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in tree.modules.items():
        base = base_of(module)
        for parameter in base._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {}).setdefault(id(base), path)
    for path in selected:
        module = base_of(tree.modules[path])
        inside = {id(part) for part in module.modules()}  # wherever else it stands
        for parameter in module.parameters():
            others = [p for i, p in owners.get(id(parameter), {}).items() if i not in inside]
            if others:
                raise TargetError(
                    f"{path}: its weight is tied to {others[0]}'s, so an adapter or a merge here would change or "
                    f"break that module too; leave it out of the targets, or untie first: {path}.weight = "
                    f"nn.Parameter({path}.weight.detach().clone()) and config.tie_word_embeddings = False"
                )


def _names_of(paths: Iterable[str]) -> set[str]:
    return {path.rpartition(".")[2] for path in paths} | {path for path in paths if path}


def _example(candidates: dict[str, nn.Module]) -> str:
    return next((path for path, module in candidates.items() if _adaptable(module)), "")


def _must_match(field: str, name: str, matched: bool, paths: Iterable[str]) -> None:
    if not matched:
        names = _names_of(paths)
        near = closest(name, names) or sorted(n for n in names if n)[:5]
        raise TargetError(f"{field}: {name!r} matches no module of the model; closest names: {near}")
