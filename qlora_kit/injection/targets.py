"""From what a configuration says to an exact list of modules.

A model is looked at as its user knows it: a module already adapted, or copied for ``modules_to_save``, counts
as the one module it stands for, so a second adapter resolves exactly as the first did. Names match whole
components at the end of a path (``q_proj``, ``0.self_attn.q_proj``; never a part of a name), a regular
expression matches the whole path. Whatever matches nothing is an error with the closest real names.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from ..codecs import codec_for, find_codec
from ..config.lora import LoraConfig
from ..errors import TargetError, closest
from ..layers import AdapterLayer, LinearAdapter, ModulesToSave, find_layer_family, layer_family_for
from .architectures import default_targets

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """One module to adapt: its path, the paths where the same object stands again, rank and alpha."""

    path: str
    aliases: tuple[str, ...]
    rank: int
    alpha: float


def base_of(module: nn.Module) -> nn.Module:
    """The user's own module behind an adapter layer or a saved copy."""
    if isinstance(module, AdapterLayer):
        return module.base_layer
    return module.original_module if isinstance(module, ModulesToSave) else module


def modules_of(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(path, module) for every path of the user's model, root first; a shared module comes once a path.

    Adapter layers and saved copies are yielded as they are and not entered.
    """
    yield path, module
    if not isinstance(module, (AdapterLayer, ModulesToSave)):
        for name, child in module._modules.items():
            if child is not None:
                yield from modules_of(child, f"{path}.{name}" if path else name)


def ends_with(path: str, name: str) -> bool:
    """Whether ``name`` is ``path`` or its last whole components."""
    return path == name or path.endswith(f".{name}")


def pattern_value(path: str, patterns: dict[str, T], default: T) -> T:
    """The value of the first of ``patterns`` that is ``path``, its last components, or a regex for either."""
    for pattern, value in patterns.items():
        if ends_with(path, pattern) or re.fullmatch(rf"(?:.*\.)?(?:{pattern})", path):
            return value
    return default


def resolve(model: nn.Module, config: LoraConfig) -> list[Target]:
    """The modules that ``config`` selects in ``model``, in the model's order.

    Raises:
        TargetError: a name, regex, layer index, exclusion or pattern matches nothing; a tied weight.
        UnsupportedModuleError: a selected module's type can't be adapted; names path and type.
    """
    modules = dict(modules_of(model))
    saved = [path for path in modules if any(ends_with(path, name) for name in config.modules_to_save or ())]
    inside_saved = tuple(f"{path}." for path in saved)
    candidates = {
        path: module
        for path, module in modules.items()
        if path and path not in saved and not path.startswith(inside_saved or "\0")
    }
    selected = _select(model, config, candidates)
    selected = _only_layers(selected, config)
    selected = _without_excluded(selected, config, modules)
    if not selected:
        raise TargetError("layers_to_transform and exclude_modules leave no module to adapt; loosen one of them")
    _check_patterns(selected, config)
    _check_tied(model, selected, modules)

    targets: dict[int, Target] = {}
    for path in selected:
        module = base_of(modules[path])
        codec_for(module, path)
        layer_family_for(module, path)
        if (first := targets.get(id(module))) is not None:
            targets[id(module)] = Target(first.path, (*first.aliases, path), first.rank, first.alpha)
            continue
        rank = pattern_value(path, config.rank_pattern, config.r)
        alpha = pattern_value(path, config.alpha_pattern, config.lora_alpha)
        targets[id(module)] = Target(path, (), rank, alpha)
    return list(targets.values())


def resolve_saved(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Paths of the modules that ``modules_to_save`` names; every name must match."""
    modules = dict(modules_of(model))
    paths = [path for path in modules if path and any(ends_with(path, name) for name in names or ())]
    for name in names or ():
        _must_match("modules_to_save", name, any(ends_with(path, name) for path in paths), modules)
    _check_tied(model, paths, modules)
    return paths


def shortest_names(paths: Iterable[str], model: nn.Module) -> list[str]:
    """The fewest and shortest names that select exactly ``paths``: what an adapter file should say."""
    wanted = set(paths)
    others = [path for path, _ in modules_of(model) if path and path not in wanted]
    names: set[str] = set()
    for path in sorted(wanted):
        parts = path.split(".")
        suffixes = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names.add(next((s for s in suffixes if not any(ends_with(other, s) for other in others)), path))
    return sorted(names)


def end_tables(model: nn.Module) -> list[nn.Module | None]:
    """The modules of words at both ends of ``model``, as transformers tells them: embedding and head."""
    found: list[nn.Module | None] = []
    for end in ("input", "output"):
        try:
            found.append(getattr(model, f"get_{end}_embeddings", lambda: None)())
        except NotImplementedError:  # a model without any says so in this way
            found.append(None)
    return found


def _adaptable(module: nn.Module) -> bool:
    base = base_of(module)
    return find_codec(base) is not None and find_layer_family(base) is not None


def _select(model: nn.Module, config: LoraConfig, candidates: dict[str, nn.Module]) -> list[str]:
    names: Any = config.target_modules
    if names is None:
        leaves = {path.rpartition(".")[2] for path, module in candidates.items() if _adaptable(module)}
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        names = default_targets(model_type, leaves)
        if names is None:
            raise TargetError(
                f"target_modules=None: expected a known architecture, found model_type={model_type!r}; set "
                f"target_modules to 'all-linear' or to some of {sorted(leaves)}"
            )
        names = [n for n in names if any(ends_with(path, n) for path in candidates)] or list(names)
    if names == "all-linear":
        heads = _heads(model)
        chosen = [
            path
            for path, module in candidates.items()
            if _adaptable(module)
            and issubclass(find_layer_family(base_of(module)) or nn.Module, LinearAdapter)
            and id(base_of(module)) not in heads
        ]
        if not chosen:
            raise TargetError("target_modules='all-linear': the model has no linear module besides its output head")
        return chosen
    if isinstance(names, str):
        chosen = [path for path in candidates if re.fullmatch(names, path)]
        if not chosen:
            near = closest(re.sub(r"[\\^$.*+?()\[\]{}|]+", " ", names), _names_of(candidates))
            raise TargetError(
                f"target_modules={names!r}: the regular expression matches no whole module path; closest names: "
                f"{near or sorted(_names_of(candidates))[:5]} (paths look like {_example(candidates)!r})"
            )
        return chosen
    for name in names:
        _must_match("target_modules", name, any(ends_with(path, name) for path in candidates), candidates)
    return [path for path in candidates if any(ends_with(path, name) for name in names)]


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
    patterns = config.layers_pattern or [r"[^.]+"]
    names = "|".join([patterns] if isinstance(patterns, str) else patterns)
    layer = re.compile(rf"(?:^|.*\.)(?:{names})\.(\d+)(?:\.|$)")
    found = {path: int(match[1]) for path in selected if (match := layer.match(path))}
    missing = indices - set(found.values())
    if missing:
        raise TargetError(
            f"layers_to_transform: no selected module in layer(s) {sorted(missing)}; the selected modules are in "
            f"layers {sorted(set(found.values()))} (layers_pattern={config.layers_pattern!r})"
        )
    return [path for path, index in found.items() if index in indices]


def _without_excluded(selected: list[str], config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    excluded = config.exclude_modules
    if not excluded:
        return selected
    if isinstance(excluded, str):
        _must_match("exclude_modules", excluded, any(re.fullmatch(excluded, path) for path in modules), modules)
        return [path for path in selected if not re.fullmatch(excluded, path)]
    for name in excluded:
        _must_match("exclude_modules", name, any(ends_with(path, name) for path in modules), modules)
    return [path for path in selected if not any(ends_with(path, name) for name in excluded)]


def _check_patterns(selected: list[str], config: LoraConfig) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field):
            matched = any(pattern_value(path, {pattern: True}, False) for path in selected)
            _must_match(field, pattern, matched, selected)


def _check_tied(model: nn.Module, selected: list[str], modules: dict[str, nn.Module]) -> None:
    """Refuse a module whose weight another module holds too: the delta would reach only one of them."""
    owners: dict[int, dict[int, str]] = {}
    for path, module in modules.items():
        for parameter in base_of(module)._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {}).setdefault(id(base_of(module)), path)
    for path in selected:
        module = base_of(modules[path])
        for parameter in module.parameters():
            others = [p for i, p in owners.get(id(parameter), {}).items() if i != id(module) and p != path]
            others = [p for p in others if not p.startswith(f"{path}.")]
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
