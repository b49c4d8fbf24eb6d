"""A copy of the model in each process: torch's ``DistributedDataParallel``, which averages the gradients.

By hand it is ``DistributedDataParallel(lora)``. Beside that:

- what keeps a weight in few bits is left as each process has loaded it: DDP would send the codes from the first process
  and not their scales, and packed scales, which are buffers, before every forward again;
- DDP reduces what trained when it was made. Adapters that are chosen afterwards would drift apart in silence, so the
  next forward refuses.
"""

from __future__ import annotations

from typing import Any

from torch.nn.parallel import DistributedDataParallel

from ..model import LoraModel
from .chosen import keep_to_chosen_
from .sameness import stored_in_codes


def replicate(lora: LoraModel, **options: Any) -> DistributedDataParallel:
    """``lora`` in ``DistributedDataParallel``, whose ``options`` they are (``device_ids``, ...)."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(lora, stored_in_codes(lora))
    parallel = DistributedDataParallel(lora, **options)
    keep_to_chosen_(parallel, lora, "ddp")
    return parallel
