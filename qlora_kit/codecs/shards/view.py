"""Weights of which this process holds a shard: the codec of the whole's storage, over the rank's own part.

Tensor parallelism (torch's ``parallelize_module``, transformers' ``tp_plan``) leaves the module's type and makes its
weight a DTensor: of the whole's shape, with this rank's shard as its memory. What is read of such a module, merged into
it and written is the shard: each rank does its own, and nothing is gathered. So there is no codec for sharded storage,
but a view of the module: one of the same type over the same memory whose sizes are the shard's, which the storage's own
codec is asked about.

FSDP's weights are DTensors too, but a layer computes with all of them; they are left to their codec as they are. The
two are told apart by what tensor parallelism leaves on a module that it has prepared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..base import Codec
from ..quantized import Quantized, Quantizer

# What torch's distribute_module and transformers' apply_tensor_parallelism leave on a module.
_MARKS = ("_distribute_module_applied", "_is_hooked")


def is_tensor_parallel(module: nn.Module) -> bool:
    """Whether ``module``'s weight is a DTensor that it computes with a shard of."""
    weight = module._parameters.get("weight")
    if weight is None or type(weight) in (Tensor, nn.Parameter) or not hasattr(weight, "_local_tensor"):
        return False
    return any(vars(module).get(mark) for mark in _MARKS)


def resembling(module: nn.Module, parameters: Mapping[str, Tensor]) -> Any:
    """An object of ``module``'s type and settings with other ``parameters`` and the sizes that these have, without what
    others have put around its forward."""
    found: Any = object.__new__(type(module))
    vars(found).update({name: value for name, value in vars(module).items() if name not in _LEFT_BEHIND})
    for hooks in [name for name in vars(found) if "_hooks" in name]:
        vars(found)[hooks] = type(vars(found)[hooks])()
    vars(found).update(_parameters={**dict.fromkeys(module._parameters), **parameters}, _buffers=dict(module._buffers))
    sizes = ("num_embeddings", "embedding_dim") if isinstance(module, nn.Embedding) else ("out_features", "in_features")
    vars(found).update(zip(sizes, parameters["weight"].shape, strict=True))
    return found


def local_view(module: nn.Module) -> Any:
    """``module`` as one that has this rank's shard alone, in the same memory."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    return resembling(module, {name: getattr(p, "_local_tensor", p) for name, p in own.items()})


_LEFT_BEHIND = frozenset({"forward", *_MARKS})


@cache
def shard_codec(whole: Codec) -> ShardCodec:
    """The codec of shards of what ``whole`` stores; the same one whenever it is asked for."""
    return ShardCodec(whole)


class ShardCodec(Codec):
    """Asks the storage's own codec about this rank's shard."""

    def __init__(self, whole: Codec) -> None:
        self.whole = whole
        self.name = whole.name  # type: ignore[misc]

    def reason_against(self, module: nn.Module) -> str | None:
        return self.whole.reason_against(local_view(module))

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return self.whole.shape(local_view(module))

    def read(self, module: nn.Module) -> Tensor:
        return self.whole.read(local_view(module))

    def plus(self, module: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        return self.whole.plus(local_view(module), A, B)

    def pieces(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        return self.whole.pieces(local_view(module))

    def write_(self, module: nn.Module, weight: Tensor) -> None:
        self.whole.write_(local_view(module), weight)

    def laid_out(self, module: nn.Module, matrix: Tensor) -> Tensor | None:
        return self.whole.laid_out(local_view(module), matrix)

    def matrix_of(self, stored: Tensor) -> Tensor:
        return self.whole.matrix_of(stored)

    def quantizer(self, module: nn.Module) -> Quantizer | None:
        return self.whole.quantizer(local_view(module))

    def quantized(self, module: nn.Module) -> Quantized | None:
        return self.whole.quantized(local_view(module))

    def release_(self, module: nn.Module) -> None:
        self.whole.release_(local_view(module))

    def stored(self, module: nn.Module) -> list[Tensor]:
        return self.whole.stored(local_view(module))

    def compute_dtype(self, module: nn.Module) -> torch.dtype:
        return self.whole.compute_dtype(local_view(module))

    def device(self, module: nn.Module) -> torch.device:
        return self.whole.device(local_view(module))

    def contents(self, module: nn.Module) -> Any:
        return self.whole.contents(local_view(module))

    def restore_(self, module: nn.Module, snapshot: Any) -> None:
        self.whole.restore_(local_view(module), snapshot)

    def multiplier(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        return self.whole.multiplier(local_view(module), dtype)
