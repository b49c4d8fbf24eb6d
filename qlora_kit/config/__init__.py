"""What the user asks for: plain values, checked when they are made, in our words and in PEFT's files.

A configuration knows nothing of models: which modules its names mean is ``injection``'s question.

- ``lora``: ``LoraConfig``, and how it is read from and written to JSON
- ``loftq``: ``LoftQConfig``, how a start quantizes, looks at inputs and finds its factors
- ``merge_aware``: ``MergeAware``, the merge that an adapter is trained for
- ``peft_json``: what an ``adapter_config.json`` of any PEFT release says
- ``checks``: checks of single values, with their messages
"""

from .loftq import LoftQConfig
from .lora import LoraConfig

__all__ = ["LoftQConfig", "LoraConfig"]
