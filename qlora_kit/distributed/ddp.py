"""A copy of the model in each process: torch's ``DistributedDataParallel``, which averages the gradients.

By hand it is ``DistributedDataParallel(lora)``. Beside that:

- what keeps a weight in few bits is left as each process has loaded it: DDP would send the codes from the first process
  and not their scales, and packed scales, which are buffers, before every forward again;
- DDP reduces what trained when it was made. Adapters that are chosen afterwards would drift apart in silence, so the
  next forward refuses.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import AdapterError
from ..model import LoraModel
from .sameness import stored_in_codes


def replicate(lora: LoraModel, **options: Any) -> DistributedDataParallel:
    """``lora`` in ``DistributedDataParallel``, whose ``options`` they are (``device_ids``, ...)."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(lora, stored_in_codes(lora))
    parallel = DistributedDataParallel(lora, **options)
    reduced = {id(parameter) for parameter in lora.parameters() if parameter.requires_grad}

    def check(module: nn.Module, args: Any) -> None:
        if lost := [n for n, p in lora.named_parameters() if p.requires_grad and id(p) not in reduced]:
            raise AdapterError(
                f"{lost[0]}: expected the parameters to train that trained when DistributedDataParallel was made, "
                f"found {len(lost)} others, whose gradients it doesn't reduce; choose adapters first (set_adapter), "
                "then call prepare(lora, 'ddp') again"
            )

    parallel.register_forward_pre_hook(check)
    return parallel
