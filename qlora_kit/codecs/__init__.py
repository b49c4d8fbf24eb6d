"""How base modules keep their weights: one codec per storage format, found by the module's type."""

from __future__ import annotations

from . import dense, packed
from .base import Codec, codec_for, find_codec, protect_storage_, register_codec, shielded_storage

__all__ = [
    "Codec",
    "codec_for",
    "dense",
    "find_codec",
    "packed",
    "protect_storage_",
    "register_codec",
    "shielded_storage",
]
