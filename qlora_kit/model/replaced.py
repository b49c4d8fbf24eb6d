"""What trainers put around a forward, as data: from a chain of decorators to their settings, and back.

accelerate's mixed precision takes the function out of ``model.forward``, decorates it (autocast; outputs in float32)
and binds the result to the model. Functions can't be pickled, and a second trainer puts the same around it once more;
what they were decorated with can be told from them, compared, and done again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from types import CodeType
from typing import Any

import torch

Function = Callable[..., Any]
#: A kind of decorator, and what it was made with; plain values.
Setting = tuple[Any, ...]

_AUTOCAST, _IN_FLOAT32 = "autocast", "outputs in float32"


def chain(function: Any, ends: Collection[CodeType]) -> tuple[list[Any], Any] | None:
    """The decorators of ``function``, outermost first, and what they are around: the first that is made of one of
    ``ends``. None if there is none such."""
    layers: list[Any] = []
    while function is not None:
        if getattr(function, "__code__", None) in ends:
            return layers, function
        layers.append(function)
        function = getattr(function, "__wrapped__", None)
    return None


def settings_of(layers: Iterable[Any]) -> list[Setting] | None:
    """What ``layers`` do, outermost first; of each kind the outermost, which is the newest. None if one is unknown."""
    found: dict[str, Setting] = {}
    for layer in layers:
        if type(layer).__name__ == "ConvertOutputsToFp32":  # the function around it stands for it
            continue
        setting = _setting(layer)
        if setting is None:
            return None
        found.setdefault(setting[0], setting)
    return list(found.values())


def decorated(function: Function, settings: Iterable[Setting]) -> Function:
    """``function`` decorated by ``settings``, outermost first."""
    for kind, *made_with in reversed(list(settings)):
        if kind == _AUTOCAST:
            device, dtype, enabled, cache = made_with
            function = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)(function)
        else:
            from accelerate.utils import convert_outputs_to_fp32

            function = convert_outputs_to_fp32(function)
    return function


def _setting(layer: Any) -> Setting | None:
    if not inspect.isfunction(layer):
        return None
    name, module = layer.__code__.co_name, layer.__globals__.get("__name__")
    if name == "decorate_autocast" and module == "torch.amp.autocast_mode":
        context = inspect.getclosurevars(layer).nonlocals["autocast_instance"]
        return _AUTOCAST, context.device, context.fast_dtype, context._enabled, context._cache_enabled
    if name == "forward" and module == "accelerate.utils.operations":
        return (_IN_FLOAT32,)
    return None
