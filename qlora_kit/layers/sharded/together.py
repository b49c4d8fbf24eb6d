"""What ranks do each to its own part of a layer, and have to do all or none: a value that isn't finite may be in one
part alone, and the rank that refuses it must not leave the others with half a merge, waiting for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from ...errors import AdapterError, MergeError
from .collectives import alone, joined
from .sharding import Sharding, sharding_of


def summed(sharding: Sharding | None, values: Sequence[float]) -> list[float]:
    """``values`` added over the ranks that share a layer; as they are where nobody does."""
    if sharding is None or alone(sharding.group):
        return list(values)
    told = torch.tensor(values, dtype=torch.float64, device=_device(sharding))
    dist.all_reduce(told, group=sharding.group)
    return told.tolist()


def check_in_step(sharding: Sharding, device: torch.device) -> None:
    """Raise an AdapterError, on all ranks, unless the random generators of ``device`` are in one state on all of them:
    what each would drop of inputs that are the same on every rank has to be the same, or replicas part."""
    if alone(sharding.group):
        return
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    digest = int.from_bytes(hashlib.sha256(state.numpy().tobytes()).digest()[:6], "little")
    told = torch.tensor([digest], device=_device(sharding))
    if len(set(joined(told, 0, sharding.group).tolist())) > 1:
        raise AdapterError(
            f"dropout: expected one random state on all {sharding.size} processes that share a layer, found several; "
            "call torch.manual_seed(seed) with the same seed on each before the first step, or set lora_dropout=0"
        )


@contextmanager
def all_or_none(module: nn.Module) -> Iterator[None]:
    """In the block each rank does something to its part of ``module``; where one raises, all raise.

    Raises:
        MergeError: another rank raised; its own message says what.
    """
    sharding = sharding_of(module)
    error: Exception | None = None
    try:
        yield
    except Exception as found:
        error = found
    (failed,) = summed(sharding, [float(error is not None)])
    if error is not None:
        raise error
    if failed:
        raise MergeError(
            f"{failed:.0f} of the {sharding.size if sharding else 1} processes that share this layer refused its part; "
            "their messages say why (no layer was changed)"
        )


def _device(sharding: Sharding) -> torch.device:
    """Where what is told to other ranks has to lie."""
    on_gpu = dist.get_backend(sharding.group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
