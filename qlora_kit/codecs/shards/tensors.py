"""Tensors that an engine keeps in pieces, one a process: told apart, gathered whole, filled.

Two kinds are known. torch's FSDP2 and its tensor parallelism make ``DTensor``s, which know their whole shape.
DeepSpeed's ZeRO-3 leaves parameters without elements in the model, whose attributes (``ds_shape``, ``ds_tensor``) know
the rest. Neither library is imported for it.

Gathering is a matter of all processes that hold pieces: one that doesn't come leaves the others waiting inside a
collective, which on GPUs ends the process after minutes without saying why. So they first ``meet`` over the store that
the process group was set up with, and who waits in vain is told whom for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...errors import StorageError

_meetings = 0


def is_dtensor(tensor: Any) -> bool:
    """Whether ``tensor`` is torch's DTensor, in however many pieces; its library isn't imported to ask."""
    return type(tensor).__module__ == "torch.distributed.tensor" and hasattr(tensor, "_local_tensor")


def is_partitioned(tensor: Any) -> bool:
    """Whether ``tensor`` is a parameter that ZeRO-3 has partitioned."""
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_shape")


def is_sharded(tensor: Any) -> bool:
    """Whether another process may hold a part of ``tensor``, so that only all of them together have it whole."""
    return is_dtensor(tensor) or is_partitioned(tensor)


def whole_shape(tensor: Tensor) -> torch.Size:
    """The shape that ``tensor`` has in one process."""
    return torch.Size(tensor.ds_shape) if is_partitioned(tensor) else tensor.shape  # type: ignore[attr-defined]


def engine_of(module: nn.Module) -> str | None:
    """The engine that keeps parameters of ``module`` or its children in pieces, by its name; None if none does."""
    if "deepspeed" in sys.modules and any(map(is_partitioned, module.parameters())):
        return "DeepSpeed's ZeRO-3"
    managed = vars(module).get("_is_fsdp_managed_module")  # other DTensors are tensor parallelism's
    return "FSDP2" if managed and any(map(is_dtensor, module.parameters())) else None


def to_pieces_(model: nn.Module) -> None:
    """Have FSDP2 let go of what it has gathered: after an evaluation it leaves the outermost group whole, in parameters
    that aren't the ones it keeps."""
    for module in model.modules():
        if hasattr(type(module), "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def own_part(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that is in this process's memory; ``tensor`` itself where it isn't sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def ranks_of(tensors: Iterable[Tensor]) -> list[int]:
    """The processes that hold parts of any of ``tensors``, by their global ranks; empty where none is sharded."""
    ranks: set[int] = set()
    for tensor in tensors:
        if is_dtensor(tensor):
            ranks.update(tensor.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
        elif is_partitioned(tensor):
            group = getattr(tensor, "ds_process_group", None)
            ranks.update(dist.get_process_group_ranks(group) if group is not None else range(dist.get_world_size()))
    return sorted(ranks)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` as one process has it; a collective where it is sharded, so call ``meet`` first."""
    if is_dtensor(tensor):
        return tensor.detach().full_tensor()  # type: ignore[attr-defined]
    if is_partitioned(tensor):
        with _deepspeed().zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.detach()


@torch.no_grad()
def fill_(tensor: Tensor, value: Tensor) -> None:
    """Write ``value``, which every process has whole, into ``tensor``: into each process's part of it."""
    if is_partitioned(tensor):
        with _deepspeed().zero.GatheredParameters([tensor], modifier_rank=0):
            tensor.copy_(value)
        if (held := getattr(tensor, "_z3_optimizer", None)) is not None and tensor.requires_grad:
            held.set_local_hp_param(partition_of(tensor, value), tensor)  # the optimizer's own copy
    elif is_dtensor(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        value = value.to(device=own_part(tensor).device, dtype=tensor.dtype)
        own_part(tensor).copy_(own_part(distribute_tensor(value, mesh, placements, src_data_rank=None)))
    else:
        tensor.copy_(value)
        if getattr(tensor, "_hp_mapping", None) is not None:  # ZeRO-2, whose optimizer has its own copy
            tensor.set_full_hp_param(tensor.detach().float())  # type: ignore[attr-defined]


def partition_of(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of ``value``, as ZeRO-3 cuts ``parameter``: flat, zeros where the last part is short."""
    size = parameter.ds_tensor.ds_numel
    flat = value.flatten().float()
    rank = dist.get_rank(getattr(parameter, "ds_process_group", None))
    own = flat[rank * size : (rank + 1) * size]
    return torch.cat([own, own.new_zeros(size - own.numel())]).to(parameter.ds_tensor.device)


def meet(ranks: Sequence[int], what: str) -> None:
    """Return once all of ``ranks`` have called this, for the same purpose in the same order.

    Raises:
        StorageError: some didn't within the time that a collective waits for them; it says which.
    """
    global _meetings
    if len(ranks) < 2:
        return
    store, own = dist.distributed_c10d._get_default_store(), dist.get_rank()
    names = {rank: f"qlora_kit.shards/{_meetings}/{'-'.join(map(str, ranks))}/{rank}" for rank in ranks}
    store.set(names[own], "here")
    try:
        store.wait(list(names.values()), _patience())
    except RuntimeError as error:
        missing = [rank for rank, name in names.items() if not store.check([name])]
        with suppress(RuntimeError):  # not every store can
            store.delete_key(names[own])  # who comes now doesn't find this one here
        raise StorageError(
            f"{what}: expected all of the processes {list(ranks)} to call it, since each holds a part of the tensors, "
            f"found that {missing} didn't within {_patience().total_seconds():.0f} s; call it on every rank (one of "
            "them writes), not under `if rank == 0`"
        ) from error
    _meetings += 1


def is_writer() -> bool:
    """Whether this process is the one that writes what all have gathered."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _patience() -> timedelta:
    """How long the default process group waits for others."""
    with suppress(Exception):  # there are groups without options
        backend: Any = dist.group.WORLD._get_backend(torch.device("cpu"))  # type: ignore[union-attr]
        return timedelta(seconds=backend.options._timeout.total_seconds())
    return dist.distributed_c10d.default_pg_timeout


def _deepspeed() -> Any:
    """DeepSpeed, which is there where its parameters are."""
    return sys.modules["deepspeed"]
