"""Factors and weights of a sharded layer, cut to this rank's part and gathered again.

Over a ``DeviceMesh`` a factor is a DTensor, of the whole's shape and with the rank's part as its memory: optimizers,
gradient clipping and checkpoints of torch know what a norm or a state of it is. The same code, given plain tensors of
the rank's part, would clip every rank by another norm, and replicas would part. Libraries with conventions of their own
get plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import alone, joined, piece_of
from .sharding import Sharding


def cut(sharding: Sharding, whole: Tensor, dim: int | None) -> Tensor:
    """This rank's part of ``whole`` along ``dim``, in memory of its own; all of it for None."""
    if dim is None or alone(sharding.group):
        return whole
    blocks = [piece_of(block, dim, sharding.group) for block in whole.chunk(sharding.pieces, dim)]
    return torch.cat(blocks, dim) if len(blocks) > 1 else blocks[0].clone(memory_format=torch.contiguous_format)


def gathered(sharding: Sharding, part: Tensor, dim: int | None, size: int | None = None) -> Tensor:
    """All ranks' parts along ``dim``, ``size`` in all, on every rank; without gradients."""
    part = local(part).detach()
    if dim is None or alone(sharding.group):
        return part
    if sharding.pieces > 1:
        return torch.cat([joined(block, dim, sharding.group) for block in part.chunk(sharding.pieces, dim)], dim)
    return joined(part, dim, sharding.group, size)


def agreed(sharding: Sharding, whole: Tensor) -> Tensor:
    """``whole`` as the group's first rank has it: what ranks have drawn differs where their generators do."""
    if not alone(sharding.group) and not whole.is_meta:
        whole = whole.contiguous()
        first = 0 if sharding.group is None else dist.get_global_rank(sharding.group, 0)
        dist.broadcast(whole, first, group=sharding.group)
    return whole


def held(sharding: Sharding, part: Tensor, dim: int | None, size: int) -> Tensor:
    """``part`` as the layer's parameter holds it; ``size`` is the whole's along ``dim``."""
    return part if sharding.mesh is None else dtensor_of(part, sharding.mesh, dim, size)


def dtensor_of(part: Tensor, mesh: Any, dim: int | None, size: int | None = None) -> Tensor:
    """The DTensor of which ``part`` is this rank's part along ``dim`` (None: all of it), ``size`` in all, by default
    equal parts."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if dim is None:
        return DTensor.from_local(part, mesh, [Replicate()], run_check=False)
    if size is None:
        return DTensor.from_local(part, mesh, [Shard(dim)], run_check=False)
    shape = torch.Size([size if n == dim else length for n, length in enumerate(part.shape)])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, mesh, [Shard(dim)], run_check=False, shape=shape, stride=stride)


def placed_as(like: Any, part: Tensor) -> Tensor:
    """The DTensor of which ``part`` is this rank's, of the shape and placed as ``like``, which is one."""
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def local(tensor: Tensor) -> Tensor:
    """This rank's part of ``tensor`` as a plain tensor; gradients flow to it."""
    found: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if found is None else found()
