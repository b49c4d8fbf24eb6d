"""The base of configurations."""

from __future__ import annotations

from typing import Any

from ..configs import PeftConfig
from ..configs import PeftConfig as PeftConfigMixin
from ..foreign import foreign

__all__ = ["PeftConfig", "PeftConfigMixin"]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
