"""``replace_lora_weights_loftq``."""

from ...loftq import replace_lora_weights_loftq

__all__ = ["replace_lora_weights_loftq"]
