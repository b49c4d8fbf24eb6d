"""The life of named adapters on one model: added, active, switched off, combined, merged, saved, deleted.

- ``lora_model``: ``LoraModel`` and ``apply_lora``
- ``proxy``: how the wrapper passes for the model that it wraps
- ``life``: adapters come and go
- ``combining``: adapters combined into a new one
- ``loading``: a stored adapter onto a model
- ``hub``: adapters to the Hub
"""

from .lora_model import LoraModel, apply_lora

__all__ = ["LoraModel", "apply_lora"]
