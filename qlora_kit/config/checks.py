"""Checks of configuration values: each passes, or raises a ConfigError with the field, value and fix."""

from __future__ import annotations

import sys

from torch import nn

from ..errors import ConfigError, closest
from ..naming import Expression


def failure(name: str, expected: str, value: object, fix: str) -> ConfigError:
    """The error to raise for a field that holds what it can't."""
    return ConfigError(f"{name}: expected {expected}, found {value!r}; {fix}")


def check_model(model: object, call: str) -> None:
    """Refuse what isn't a module: a name where the model goes, or arguments in another order."""
    if not isinstance(model, nn.Module):
        found = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise ConfigError(f"model: expected a model that is loaded (torch.nn.Module), found {found}; call {call}")


def check_int(name: str, value: object, least: int, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise failure(name, f"an integer of at least {least}", value, fix)


def check_positive(name: str, value: object, fix: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value <= sys.float_info.max):
        raise failure(name, "a finite number above 0", value, fix)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise failure(name, "True or False", value, f"pass {name}=True or {name}=False")


def check_choice(name: str, value: object, choices: tuple[str, ...], fix: str) -> None:
    if not isinstance(value, str) or value not in choices:
        near = closest(value, choices, count=1) if isinstance(value, str) else []
        raise failure(name, f"one of {list(choices)}", value, f"did you mean {near[0]!r}?" if near else fix)


def check_regex(name: str, value: str) -> None:
    Expression(value, name)


def check_device(name: str, value: object) -> None:
    """That torch can put a tensor on ``value``, a device or its name."""
    import torch

    try:
        if torch.empty(0, device=value).is_meta:  # type: ignore[call-overload]
            raise RuntimeError("meta has no memory")
    except Exception as error:  # of any kind: torch asks its backends, which may not be there
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise failure(name, "a device of this machine", str(value), f"pass {name}='cpu' ({said})") from error


def check_names(name: str, value: object, *, regex: bool) -> list[str] | str | None:
    """``value`` as a new list of names (sets sorted), or as a regular expression where ``regex`` allows it."""
    if value is None:
        return None
    kinds = "a list of module names" + (" or a regular expression" if regex else "")
    if isinstance(value, str):
        if not regex or not value:
            raise failure(name, kinds, value, f"pass {name}=[{value!r}]" if value else f"leave {name} out")
        check_regex(name, value)
        return value
    if not isinstance(value, (list, tuple, set, frozenset)) or not all(isinstance(v, str) and v for v in value):
        raise failure(name, kinds, value, f"pass {name}=['q_proj', 'v_proj'] or the like")
    return sorted(value) if isinstance(value, (set, frozenset)) else list(dict.fromkeys(value))
