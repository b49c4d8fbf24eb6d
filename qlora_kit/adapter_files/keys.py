"""What the key of a tensor says: whether it is a factor, of a branch on which module, and which of the two.

The end of a key tells, never a part of it: a model's own modules may be called ``lora_head``.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# In an adapter's file ("0.lora_A.weight"), and in a model's state dict, where the adapter's name follows.
_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<end>\.weight)?")
_IN_MODEL = re.compile(r".*\.lora_(?:embedding_)?[AB]\.[^.]+(?:\.weight)?")


class Factor(NamedTuple):
    """The module that a factor belongs to, by the file's name for it, and the factor's side, "A" or "B"."""

    path: str
    side: str


def factor(key: str) -> Factor | None:
    """What factor an adapter's file keeps under ``key``; None for every other tensor."""
    match = _FACTOR.fullmatch(key)
    if match is None or bool(match["embedding"]) == bool(match["end"]):  # a table's factors are plain parameters
        return None
    return Factor(match["path"], match["side"])


def is_factor_in_model(name: str) -> bool:
    """Whether ``name``, of a wrapped model's state dict, is that of a factor."""
    return _IN_MODEL.fullmatch(name) is not None
