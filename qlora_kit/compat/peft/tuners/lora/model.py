"""``LoraModel``."""

from __future__ import annotations

from typing import Any

from .....model.lora_model import LoraModel
from ....foreign import foreign

__all__ = ["LoraModel"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
