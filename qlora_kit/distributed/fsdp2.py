"""A piece of each parameter in each process: torch's ``fully_shard`` on the blocks of a model, then on the wrapper.

By hand it is ``for block in blocks: fully_shard(block)`` and ``fully_shard(lora)``. Beside that:

- int8 weights, whose parameters carry their scales, stay whole (``ignored_params``);
- dtypes and 4-bit storage are checked before anything is changed;
- each process starts from the first one's adapters, and from its values of what was drawn without a seed;
- ``generate`` gathers what the wrapper itself holds, as ``forward`` does.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from ..model import LoraModel
from ..naming import every_module
from ..training.preparation.sharding import check_group, groups, stays_whole
from .blocks import repeated_blocks
from .sameness import check_same


def shard_(lora: LoraModel, blocks: Sequence[nn.Module] | None = None, **options: Any) -> LoraModel:
    """Shard ``lora`` in place and return it. Make the optimizer afterwards: its parameters are other ones.

    Args:
        blocks: what is gathered at a time; by default ``repeated_blocks(lora)``.
        options: ``fully_shard``'s (``mesh``, ``mp_policy``, ``reshard_after_forward``, ``offload_policy``, ...).

    Raises:
        AdapterError: trained parameters of one block in several dtypes, 4-bit codes that ``mp_policy`` would cast, or a
            model that isn't the same in every process; nothing is sharded.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    blocks = repeated_blocks(lora) if blocks is None else blocks
    differing = check_same(lora)
    param_dtype = getattr(options.get("mp_policy"), "param_dtype", None)
    for group in groups(lora, blocks):
        check_group(group, param_dtype)
    share_start_(lora, differing)
    whole = {p for m in every_module(lora) for p in m._parameters.values() if p is not None and stays_whole(m, p)}
    whole |= set(options.pop("ignored_params", None) or ())
    for module in (*blocks, lora):
        fully_shard(module, ignored_params=whole, **options)
    if hasattr(lora.model, "generate"):
        register_fsdp_forward_method(lora, "generate")
    return lora


def share_start_(lora: LoraModel, differing: Collection[str] = ()) -> None:
    """Give each process the first one's values of what is trained, and of the parameters that are named."""
    on_gpus = dist.get_backend() == "nccl"
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad or name in differing:
            value = parameter.detach()
            sent = value.cuda() if on_gpus else value
            dist.broadcast(sent, 0)
            value.copy_(sent)
