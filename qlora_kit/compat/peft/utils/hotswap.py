"""Adapters swapped under a compiled model, which isn't here; its names say so."""

from __future__ import annotations

from typing import Any

from ...foreign import foreign


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
