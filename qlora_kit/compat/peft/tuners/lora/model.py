"""``LoraModel``."""

from .....model.lora_model import LoraModel

__all__ = ["LoraModel"]
