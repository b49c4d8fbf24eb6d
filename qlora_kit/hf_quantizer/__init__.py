"""How transformers is told of a quantized model, so that ``from_pretrained(folder)`` loads what was stored.

Two configurations can say it. transformers' own for bitsandbytes converts by rule, every linear but a list; ours
names the modules one by one, and is taken where the rule would build something else than what is stored: packed
layers, several types in one model, linears that transformers doesn't convert, architectures that it takes apart.
This room is imported, and registers with transformers, once both transformers and qlora_kit are.

- ``config``: ours, and what it says of a module
- ``loader``: builds the empty modules that ours names, for transformers to fill
- ``tensor_parallel``: modules that ours names, in a model that transformers shares out to several processes
- ``stock``: transformers' own, and what its rule would build of a model
- ``recorded``: which of the two describes a model, and its config made to say so
"""

from .config import PackedConfig, Stored
from .loader import PackedQuantizer
from .recorded import record_quantization_, storage_config
from .stock import bitsandbytes_config, forget_gathering_, skipped_modules

__all__ = [
    "PackedConfig",
    "PackedQuantizer",
    "Stored",
    "bitsandbytes_config",
    "forget_gathering_",
    "record_quantization_",
    "skipped_modules",
    "storage_config",
]
