"""The configuration of an adapter that was computed from others: exactly their modules, with the ranks they got.

A combination has scaling 1 everywhere, so alpha is the rank, module by module, and nothing is left of the sources'
alphas, patterns and rslora. Its targets must select the union of the sources' modules and not one more, also where
only files are at hand and the model isn't: names are joined where each means the same by itself, and elsewhere the
paths are spelled out as a regular expression.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..naming import Expression, ends_with, pattern_value


def combined_config(configs: Sequence[LoraConfig], ranks: Mapping[str, int]) -> LoraConfig:
    """What to store beside an adapter combined from adapters of ``configs``, with ``ranks`` by path.

    What says nothing about modules, ranks and starts (task type, base model, dropout, ...) is the first's.
    """
    first = configs[0]
    saved = [name for config in configs for name in config.modules_to_save or ()]
    bases = [config.base_model_name_or_path for config in configs if config.base_model_name_or_path]
    return replace(
        first,
        **rank_fields(ranks),
        **_selection(configs, list(ranks)),
        modules_to_save=list(dict.fromkeys(saved)) or None,
        base_model_name_or_path=bases[0] if bases else None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        init_lora_weights=True,
        loftq_config=None,
        merge_aware=None,  # another sum than those that were trained through a rounding
        ensure_weight_tying=False,  # all that shared one has its own now, and is named
    )


def check_apart(configs: Mapping[str, LoraConfig], paths: Iterable[str]) -> None:
    """Refuse low-rank branches at ``paths`` in modules that one of the adapters, by name, trains whole.

    Raises:
        AdapterError: names the module.
    """
    for path in paths:
        for adapter, config in configs.items():
            if whole := holder_of(path, config):
                raise AdapterError(
                    f"{whole}: expected a module that one adapter trains whole (modules_to_save, here {adapter!r}) or "
                    f"others adapt, found both ({path} is adapted); leave {adapter!r} or the others out"
                )


def holder_of(path: str, config: LoraConfig) -> str | None:
    """The module, ``path`` or one above it, that ``modules_to_save`` of ``config`` names."""
    parts = path.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return next((p for p in above if any(ends_with(p, name) for name in config.modules_to_save or ())), None)


def rank_fields(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Fields of a LoraConfig that give each path its rank and scaling 1; the commonest rank is the default."""
    counts = Counter(ranks.values())
    common = max(counts, key=lambda rank: (counts[rank], rank))
    others = {path: rank for path, rank in ranks.items() if rank != common}
    pattern = {_pattern(path, ranks): rank for path, rank in others.items()}
    return {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "use_rslora": False,
    }


def _pattern(path: str, paths: Mapping[str, int]) -> str:
    """``path`` as a pattern for itself alone: as it is, or anchored where it would match another of ``paths`` too."""
    alone = not any(pattern_value(other, {path: True}, False) for other in paths if other != path)
    return path if alone else f"^{re.escape(path)}$"


def _selection(configs: Sequence[LoraConfig], paths: list[str]) -> dict[str, Any]:
    """The fields that select exactly ``paths``."""
    fields = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")
    each = [{field: getattr(config, field) for field in fields} for config in configs]
    ensured = any(config.ensure_weight_tying for config in configs)  # then names select more than what they mean
    if not ensured and all(one == each[0] for one in each):
        return each[0]
    free: dict[str, Any] = dict.fromkeys(fields)
    targets: list[Any] = [one.pop("target_modules") for one in each]
    if not any(value is not None for one in each for value in one.values()):
        if all(isinstance(target, (list, set)) for target in targets):
            names = sorted({name for target in targets for name in target})
            if all(any(ends_with(path, name) for name in names) for path in paths):
                return {**free, "target_modules": names}
        if all(isinstance(target, str) and target != "all-linear" for target in targets):
            regex = "|".join(f"({target})" for target in dict.fromkeys(targets))
            if all(map(Expression(regex, "target_modules").fullmatch, paths)):
                return {**free, "target_modules": regex}
    return {**free, "target_modules": "|".join(re.escape(path) for path in paths)}
