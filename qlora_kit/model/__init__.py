"""The life of named adapters on one model: added, active, switched off, combined, merged, saved, deleted.

The face of what lies below: what it knows of its adapters is one ``Adapted``, and each method is a call of a function
over that. Nothing below imports it; it must not hold state of its own, or walk the model.

- ``lora_model``: ``LoraModel`` and ``apply_lora``
- ``proxy``: how the wrapper passes for the model that it wraps
- ``replaced``: what trainers put around a forward, as data
- ``keywords``: what PEFT's models are called with beside the base model's
- ``row_adapters``: one call with an adapter for each row of the batch
- ``of_transformers``: what transformers' models do to their own modules, under adapters
- ``life``: adapters come and go
- ``merge_aware``: computed as it will be merged, or without the rounding
- ``base_files``: the base under its adapters, saved
- ``combining``: adapters combined into a new one
- ``loading``: a stored adapter onto a model
- ``counting``: how many parameters it trains
- ``hub``: adapters to the Hub
"""

from .lora_model import LoraModel, apply_lora

__all__ = ["LoraModel", "apply_lora"]
