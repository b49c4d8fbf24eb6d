"""``LoraModel``."""

from __future__ import annotations

from typing import Any

from .....model.lora_model import LoraModel
from ....foreign import foreign
from ...utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

__all__ = ["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", "LoraModel"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
