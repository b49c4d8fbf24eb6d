"""The base of configurations."""

from __future__ import annotations

from typing import Any

from ..configs import PeftConfig, PeftType, TaskType
from ..configs import PeftConfig as PeftConfigMixin
from ..foreign import foreign

__all__ = ["PeftConfig", "PeftConfigMixin", "PeftType", "TaskType"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
