"""Layer families: how a low-rank branch is applied to a module's function."""

from .base import AdapterLayer, find_layer_family, layer_family_for, register_layer
from .conv import ConvAdapter
from .embedding import EmbeddingAdapter
from .linear import LinearAdapter
from .saved import ModulesToSave

__all__ = [
    "AdapterLayer",
    "ConvAdapter",
    "EmbeddingAdapter",
    "LinearAdapter",
    "ModulesToSave",
    "find_layer_family",
    "layer_family_for",
    "register_layer",
]
