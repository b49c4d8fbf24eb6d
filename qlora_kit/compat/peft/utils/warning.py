"""Warning classes."""

from ...errors import PeftWarning

__all__ = ["PeftWarning"]
