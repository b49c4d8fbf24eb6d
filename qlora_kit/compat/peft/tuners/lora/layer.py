"""Layer classes, for ``isinstance``."""

from __future__ import annotations

from typing import Any

from .....layers import AdapterLayer as LoraLayer
from ....foreign import foreign
from ....layer_kinds import Conv1d, Conv2d, Conv3d, Embedding, Linear

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
