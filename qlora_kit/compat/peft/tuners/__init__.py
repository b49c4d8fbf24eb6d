"""PEFT's methods, of which there is LoRA.

- ``lora/``: its layers, configuration and model
- ``tuners_utils``: the bases of layers and models
"""

from __future__ import annotations

from typing import Any

from ....config.lora import LoftQConfig
from ....model.lora_model import LoraModel
from ...configs import LoraConfig, LoraRuntimeConfig
from ...foreign import foreign

__all__ = ["LoftQConfig", "LoraConfig", "LoraModel", "LoraRuntimeConfig"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
