"""Error classes."""

from ...errors import NoMatchingPeftModuleError, PeftError

__all__ = ["NoMatchingPeftModuleError", "PeftError"]
