"""Configurations."""

from __future__ import annotations

from typing import Any

from .....config.lora import LoftQConfig
from ....configs import LoraConfig, LoraRuntimeConfig
from ....foreign import foreign

__all__ = ["LoftQConfig", "LoraConfig", "LoraRuntimeConfig"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
