"""PEFT's layer classes over adapter layers: one for each kind of base, where here there is one for each function.

They are for ``isinstance``; layers are made by injection alone. ``name_of`` is how PEFT's reports call a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ..layers import AdapterLayer, ConvAdapter, EmbeddingAdapter, LinearAdapter, ModulesToSave


class _Kind(type):
    """The type of the classes below: an instance is any adapter layer that ``holds`` takes."""

    holds: Callable[[AdapterLayer], bool]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, AdapterLayer) and cls.holds(instance)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{cls.__name__}: expected a layer made by injection, found a call; use get_peft_model")


def _linear(*codecs: str) -> Callable[[AdapterLayer], bool]:
    return lambda layer: isinstance(layer, LinearAdapter) and layer.codec.name in codecs


def _conv(kind: type[nn.Module]) -> Callable[[AdapterLayer], bool]:
    return lambda layer: isinstance(layer, ConvAdapter) and isinstance(layer.base_layer, kind)


#: What each of PEFT's classes is here. The last takes every other linear layer.
_HOLDS: dict[str, Callable[[AdapterLayer], bool]] = {
    "Embedding": lambda layer: isinstance(layer, EmbeddingAdapter),
    "Conv1d": _conv(nn.Conv1d),
    "Conv2d": _conv(nn.Conv2d),
    "Conv3d": _conv(nn.Conv3d),
    "Linear4bit": _linear("bnb-4bit"),
    "Linear8bitLt": _linear("bnb-int8"),
    "Linear": lambda layer: isinstance(layer, LinearAdapter) and layer.codec.name not in ("bnb-4bit", "bnb-int8"),
}
KINDS: dict[str, Any] = {
    name: _Kind(name, (), {"holds": staticmethod(holds), "__module__": __name__, "__doc__": "A layer of this kind."})
    for name, holds in _HOLDS.items()
}
Linear, Linear4bit, Linear8bitLt = KINDS["Linear"], KINDS["Linear4bit"], KINDS["Linear8bitLt"]
Embedding, Conv1d, Conv2d, Conv3d = (KINDS[name] for name in ("Embedding", "Conv1d", "Conv2d", "Conv3d"))


def name_of(layer: AdapterLayer | ModulesToSave) -> str:
    """PEFT's name for what ``layer`` is, such as "lora.Linear"; that of its class where PEFT has no such layer."""
    if isinstance(layer, ModulesToSave):
        return "ModulesToSaveWrapper"
    return next((f"lora.{name}" for name, holds in _HOLDS.items() if holds(layer)), type(layer).__name__)
