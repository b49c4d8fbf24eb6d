"""Factors of which each process holds a part as a plain tensor: gathered for a file, cut from one.

DTensors say themselves what they are parts of. Where a library of its own conventions has shared a layer out
(Megatron's), the layer says it (``AdapterLayer.factor_parts``); files hold the whole in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..errors import StorageError
from ..injection.adapted import Adapted
from ..layers.sharded.parts import cut, gathered
from .folder import PREFIX


def _parts(adapted: Adapted, adapter_name: str) -> Iterator[tuple[str, Tensor, Any, int]]:
    """Key in a file, this process's tensor, sharding and the dimension that is cut, of each factor that is a part."""
    for path, layer in adapted.layers().items():
        if adapter_name in layer.adapter_names():
            tensors = layer.adapter_tensors(adapter_name)
            for suffix, (sharding, dim) in layer.factor_parts(adapter_name).items():
                yield f"{PREFIX}{path}.{suffix}", tensors[suffix], sharding, dim


def whole_parts(adapted: Adapted, adapter_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, this process's tensors by the keys of a file, with those that it shares put together; every process
    that shares them has to call this."""
    whole = dict(state)
    for key, part, sharding, dim in _parts(adapted, adapter_name):
        if sharding.size > 1 and not part.is_meta:
            whole[key] = gathered(sharding, part, dim, sharding.shape[sharding.dim]).cpu().contiguous()
    return whole


def own_parts(adapted: Adapted, adapter_name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state``, whole tensors by the keys of a file, with this process's parts of those that it shares.

    Raises:
        StorageError: one of them isn't of the whole layer's size.
    """
    own = dict(state)
    for key, _, sharding, dim in _parts(adapted, adapter_name):
        if key in own and sharding.size > 1:
            found, expected = own[key].shape[dim], sharding.shape[sharding.dim]
            if found != expected:
                raise StorageError(
                    f"{key}: expected a tensor of {expected} along dimension {dim}, of which {sharding.size} processes "
                    f"have a part each, found {found}; load what save_pretrained wrote of an adapter of this model"
                )
            own[key] = cut(sharding, own[key], dim)
    return own
