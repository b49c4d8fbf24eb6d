"""What a training loop is offered beside the adapters: a loss, places for activations, optimizers.

Nothing here knows ``LoraModel``: it works on bare models, on models with adapters, and on what wraps either.

- ``cross_entropy``: ``chunked_cross_entropy``, a head's loss without the logits of all tokens
- ``deferred_logits``: logits that note what is done to them
- ``chunked_loss``: ``use_chunked_loss``, the same for a model's own loss
- ``loss_probe``: whether a model's chunked loss is its own
- ``offload``: ``offload_activations``, which wait for the backward on the CPU
- ``hooked``: what hooks on a module do until they are removed, as both of these
- ``preparation/``: a model made ready for k-bit training, and checked
- ``optimizers/``: LoRA+, LoRA-FA, optimizers by name
- ``planner/``: what memory a training run takes, before it
"""

from . import optimizers
from .chunked_loss import ChunkedLoss, use_chunked_loss
from .cross_entropy import chunked_cross_entropy
from .offload import Offload, offload_activations

__all__ = [
    "ChunkedLoss",
    "Offload",
    "chunked_cross_entropy",
    "offload_activations",
    "optimizers",
    "use_chunked_loss",
]
