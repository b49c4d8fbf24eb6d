"""``PeftMixedModel``."""

from ..tasks import PeftMixedModel

__all__ = ["PeftMixedModel"]
