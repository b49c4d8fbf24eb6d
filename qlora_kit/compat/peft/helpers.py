"""PEFT's helpers around a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...errors import AdapterError, ConfigError, StorageError
from ...layers import AdapterLayer
from ..configs import PeftConfig
from ..foreign import foreign

__all__ = [
    "check_if_peft_model",
    "disable_input_dtype_casting",
    "rescale_adapter_scale",
    "update_forward_signature",
    "update_generate_signature",
    "update_signature",
]


def update_forward_signature(model: nn.Module) -> None:
    """Nothing to do: ``model.forward`` has the base model's signature as it is."""


def update_generate_signature(model: nn.Module) -> None:
    """Nothing to do: ``model.generate`` has the base model's signature as it is."""


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Nothing to do, for "forward", "generate" or "all": the signatures are the base model's.

    Raises:
        ConfigError: another ``method``.
    """
    if method not in ("forward", "generate", "all"):
        raise ConfigError(f"method: expected 'forward', 'generate' or 'all', found {method!r}; pass one of them")


def check_if_peft_model(model_name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a folder, or a repository on the Hub, holds an adapter's configuration."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (ConfigError, StorageError):
        return False
    return True


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside the block every branch counts ``multiplier`` times.

    Raises:
        AdapterError: ``model`` has no adapter layer.
        TypeError: ``multiplier`` isn't a number.
    """
    if isinstance(multiplier, bool) or not isinstance(multiplier, (int, float)):
        raise TypeError(f"multiplier: expected a number, found {multiplier!r}; pass one such as 0.5")
    layers = _adapter_layers(model)
    if not layers:
        raise AdapterError(f"expected a model with adapters, found a {type(model).__name__} without; inject one first")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: scaling * multiplier for name, scaling in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Inside the block, if ``active``, branches take their inputs in the dtype that these come in."""
    layers = _adapter_layers(model) if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled


def _adapter_layers(model: nn.Module) -> list[AdapterLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterLayer)]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
