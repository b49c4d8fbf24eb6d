"""Optimizers for adapters: learning rates by factor, a frozen factor, states of few bits.

Each function returns an optimizer of torch's kind, for a loop of one's own or ``Trainer(..., optimizers=(it, None))``,
which then makes the schedule; its state is saved and resumed with the trainer's checkpoints.

- ``named``: ``optimizer``, torch's and bitsandbytes' by name
- ``roles``: which trained tensors are an A, a B, a table's or a vector
- ``loraplus``: ``lora_plus``, ``lora_plus_groups``: B learns faster than A
- ``lorafa``: ``lora_fa_``: A is frozen, B's gradient makes up for it
"""

from .lorafa import lora_fa_
from .loraplus import lora_plus, lora_plus_groups
from .named import optimizer, optimizer_class

__all__ = ["lora_fa_", "lora_plus", "lora_plus_groups", "optimizer", "optimizer_class"]
