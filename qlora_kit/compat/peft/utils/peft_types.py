"""Enumerations."""

from __future__ import annotations

from typing import Any

from ...configs import PeftType, TaskType
from ...foreign import foreign

__all__ = ["PeftType", "TaskType"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
