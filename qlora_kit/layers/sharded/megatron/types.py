"""From the name of a library's type to its codec, layer family and sharding."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ....codecs import Codec, on_demand, register_codec
from ...base import AdapterLayer
from ...registry import on_demand as families_on_demand
from ...registry import register_layer
from ..sharding import Finder, register_sharding
from . import shardings
from .embedding import MegatronEmbedding
from .linear import MegatronLinear
from .parts import FusedPart, FusedPartCodec, sharding_of_part
from .storage import PartCodec, QuantizedShard, QuantizedShardCodec, TableCodec


@dataclass(frozen=True)
class _Known:
    codec: type[Codec]
    family: type[AdapterLayer]
    sharding: Finder


_TE_LINEAR = _Known(PartCodec, MegatronLinear, shardings.transformer_engine)
# By library: name of the class -> what handles it. Subclasses are found along the method resolution order.
_MEGATRON = {
    "ColumnParallelLinear": _Known(PartCodec, MegatronLinear, shardings.column),
    "RowParallelLinear": _Known(PartCodec, MegatronLinear, shardings.row),
    "VocabParallelEmbedding": _Known(TableCodec, MegatronEmbedding, shardings.words),
    "TELinear": _TE_LINEAR,
    "TEColumnParallelLinear": _TE_LINEAR,
    "TERowParallelLinear": _TE_LINEAR,
    "TELayerNormColumnParallelLinear": _TE_LINEAR,
}
_KNOWN: dict[str, dict[str, _Known]] = {
    "megatron": _MEGATRON,
    "transformer_engine": {"Linear": _TE_LINEAR, "LayerNormLinear": _TE_LINEAR},
}
_met: set[type] = set()


def add_library(name: str) -> None:
    """Have the types of ``name``, a module that is a fork of ``megatron.core``, known as megatron-core's are."""
    root = name.partition(".")[0]
    _KNOWN.setdefault(root, _MEGATRON)
    for table in (on_demand, families_on_demand):
        table.setdefault(root, __package__)


def is_known(kind: type, names: Collection[str]) -> bool:
    """Whether ``kind``, or a base of it, is one of the libraries' classes called ``names``."""
    return any(base.__qualname__ in names and base.__module__.partition(".")[0] in _KNOWN for base in kind.__mro__)


def meet(kind: type) -> None:
    """Register what handles modules of ``kind``, if it or a base of it is in the table."""
    for base in kind.__mro__:
        if base not in _met and issubclass(base, nn.Module):
            _met.add(base)
            known = _KNOWN.get(base.__module__.partition(".")[0], {}).get(base.__qualname__)
            if known is not None:
                _register(base, known)


def _register(kind: type[nn.Module], known: _Known) -> None:
    register_codec(kind)(known.codec)
    register_layer(kind)(known.family)
    register_sharding(kind)(known.sharding)


register_codec(QuantizedShard)(QuantizedShardCodec)
register_codec(FusedPart)(FusedPartCodec)
register_layer(FusedPart)(MegatronLinear)
register_sharding(FusedPart)(sharding_of_part)
