"""No caches: a text is read as a whole, and what one pass leaves behind must never be seen by another.

Models make a cache of keys and values, or of states, whenever their configuration says so, which it does by default.
Where that is said differs: beside the text, in the configuration, in those that it holds for its parts (models of
images and words), in a part's own. So it is said wherever a model may look, and taken back afterwards. A cache that a
batch brings along would be one more text in front of it, and grow with each pass.

A forward that makes one all the same does no harm: see ``arguments``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from torch import nn

from qlora_kit.errors import ConfigError

_SWITCH = "use_cache"
# Under these names models take what an earlier pass has left.
_PAST = ("past_key_values", "past_key_value", "layer_past", "cache_params", "mems", "past_buckets_states")


@contextmanager
def cacheless(model: nn.Module) -> Iterator[None]:
    """Inside the block no configuration in ``model`` asks for a cache; afterwards each says what it did."""
    with ExitStack() as stack:
        for config in configs_of(model):
            if getattr(config, _SWITCH, None):
                stack.callback(_switched_off(config))
        yield


def uncached(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """``batch`` as what ``model`` is called with for it to make no cache; an empty cache in it goes.

    Raises:
        ConfigError: it brings a cache along that isn't empty.
    """
    kept = {}
    for key, value in batch.items():
        if not (key in _PAST or _is_cache(value)):
            kept[key] = value
        elif not _is_empty(value):
            raise ConfigError(
                f"calibration: expected batches without a cache, found a {type(value).__name__} under {key!r}; pass "
                "the whole text as input_ids"
            )
    if _SWITCH in kept or _SWITCH in _parameters(model):
        kept[_SWITCH] = False
    return kept


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    with suppress(TypeError, ValueError):  # of a forward that was compiled, say
        return inspect.signature(model.forward).parameters
    return {}


def _is_cache(value: Any) -> bool:
    """Whether it is one of transformers' caches, which needn't be imported to tell."""
    return any(kind.__name__ == "Cache" and kind.__module__.startswith("transformers") for kind in type(value).__mro__)


def _is_empty(value: Any) -> bool:
    if value is None:
        return True
    if _is_cache(value):
        with suppress(Exception):  # those of states alone have no length
            return not value.get_seq_length()
    return isinstance(value, (tuple, list, dict)) and not value


def configs_of(model: nn.Module) -> list[Any]:
    """Every configuration that a module of ``model`` has, and those that these hold."""
    found: dict[int, Any] = {}
    waiting = [value for module in model.modules() for value in _held(module)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting += _held(config)
    return list(found.values())


def _held(owner: Any) -> list[Any]:
    """The configurations among ``owner``'s attributes, by their name or that of their type."""
    return [
        value
        for name, value in vars(owner).items()
        if hasattr(value, "__dict__")
        and not isinstance(value, (type, nn.Module))
        and ("config" in name.lower() or "config" in type(value).__name__.lower())
    ]


def _switched_off(config: Any) -> Any:
    """Switch it off; what undoes that. A configuration that allows no changes is asked past its own ``__setattr__``."""
    own = vars(config).get(_SWITCH)
    had = _SWITCH in vars(config)
    try:
        setattr(config, _SWITCH, False)
        put, take = setattr, delattr
    except AttributeError:
        with suppress(AttributeError):  # a property: then it isn't this object that says so
            object.__setattr__(config, _SWITCH, False)
        put, take = object.__setattr__, object.__delattr__

    def undo() -> None:
        with suppress(AttributeError):
            if had:
                put(config, _SWITCH, own)
            else:
                take(config, _SWITCH)

    return undo
