"""Names against a configuration, one at a time, where there is no model: PEFT's two functions for that."""

from __future__ import annotations

from collections.abc import Iterable

from ..config.lora import LoraConfig
from ..errors import AdapterError
from ..naming import Expression, Suffixes, ends_with


def check_target_module_exists(config: LoraConfig, key: str) -> bool:
    """Whether ``config`` selects the module at path ``key`` of a model that has it."""
    excluded, targets = config.exclude_modules or (), config.target_modules or ()
    if _named(excluded, key) or any(_inside(key, name) for name in config.modules_to_save or ()):
        return False
    if isinstance(targets, str):
        return _named(targets, key)
    if key in targets:  # a whole path says which layer it means
        return True
    return _named(targets, key) and _in_layers(config, key)


def _named(names: Iterable[str], key: str) -> bool:
    if isinstance(names, str):
        return Expression(names, "target_modules").fullmatch(key)
    return any(ends_with(key, name) for name in names)


def _inside(key: str, name: str) -> bool:
    parts = key.split(".")
    return any(ends_with(".".join(parts[:end]), name) for end in range(1, len(parts) + 1))


def _in_layers(config: LoraConfig, key: str) -> bool:
    wanted = config.layers_to_transform
    if wanted is None or wanted == []:
        return True
    patterns = config.layers_pattern or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        # The first index after a name counts; without a pattern there is a name before that one, too.
        lead = r".*?\." if config.layers_pattern is None else r"(?:^|.*?\.)"
        found = Expression(rf"{lead}{pattern}\.(\d+)\.", "layers_pattern").group(key)
        if found is not None:
            return int(found) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """The shortest ends of the paths ``target_modules`` that are ends of none of ``other_module_names``.

    Raises:
        AdapterError: no targets, one that is no name, or one that is among the others.
    """
    if isinstance(target_modules, str):
        raise AdapterError(f"target_modules: expected a list or set of names, found {target_modules!r}; pass [it]")
    wanted, others = sorted(set(target_modules)), {name for name in other_module_names if name}
    if not wanted or "" in wanted or others & set(wanted):
        raise AdapterError(
            f"target_modules: expected names, none of them among the others, found {wanted[:3]}, of which "
            f"{sorted(others & set(wanted))[:3]} are among the others; leave these out of one of the two"
        )
    return Suffixes(others).apart(wanted)
