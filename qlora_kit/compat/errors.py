"""PEFT's error and warning classes: the toolkit's own errors under PEFT's names."""

from __future__ import annotations

from ..errors import QLoRAKitError as PeftError
from ..errors import TargetError as NoMatchingPeftModuleError

__all__ = ["NoMatchingPeftModuleError", "PeftError", "PeftWarning"]


class PeftWarning(UserWarning):
    """Of what PEFT lets pass with a warning."""
