"""What memory does a training run take? Answered from a model's configuration, before anything is downloaded.

It knows nothing of training itself: it makes the calls that a user makes, on tensors without values, and counts.

- ``plan``: ``plan_memory``
- ``settings``: what a run is planned with
- ``cards``: GPUs and what they have
- ``empty``: the model without values, quantized, prepared and with adapters
- ``step``: one training step on it
- ``merged``: what a step holds that is trained through a merge's rounding
- ``live``: bytes that are held at each moment
- ``kernels``: a GPU's kernels, on the meta device
- ``depth``: a deep model's step from two shallow ones
- ``optimizers``: what they keep of each parameter
- ``estimate``: the peak, part by part
- ``world``: of several GPUs, what each holds and sends
- ``search``: the largest sequence and batch that fit, and what to change
- ``report``: ``MemoryPlan``, a table and plain data
"""

from .cards import CARDS, Card, card_named
from .plan import plan_memory
from .report import MemoryPlan
from .settings import Settings

__all__ = ["CARDS", "Card", "MemoryPlan", "Settings", "card_named", "plan_memory"]
