"""LoRA's layers, configuration and model.

- ``config``: configurations
- ``layer``: layer classes, for ``isinstance``
- ``model``: ``LoraModel``
"""

from __future__ import annotations

from typing import Any

from .....config.lora import LoftQConfig
from .....model.lora_model import LoraModel
from ....configs import LoraConfig, LoraRuntimeConfig
from ....foreign import foreign
from ....layer_kinds import Linear4bit, Linear8bitLt
from .layer import Conv1d, Conv2d, Conv3d, Embedding, Linear, LoraLayer

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "Embedding",
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "LoraRuntimeConfig",
]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
