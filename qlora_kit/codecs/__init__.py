"""How a base module keeps its weight: ``read`` gives it in float32 (out, in), ``write_`` stores it.

A codec answers for one storage format and never asks what is done with the weight: how packed ones are multiplied
with is ``kernels``'. One is found by the module's type, and says whether it holds that module's matrix.

- ``base``: ``Codec``, what every one promises
- ``registry``: from a module to its codec, by its type and by what the codec says of it
- ``plain_weight``: is a module's ``weight`` the matrix it multiplies by?
- ``dense``: one floating-point ``weight``: linear, embedding (transposed), convolution (flattened)
- ``conv1d``: transformers' ``Conv1D``, stored (in, out)
- ``packed``: ``PackedLinear``, 2, 3, 4 or 8 bits without a gap
- ``bnb/``: bitsandbytes' 4-bit and int8 linears
- ``quantized``: a quantized matrix as data: codes, scales, and what reads them back
- ``blockwise``: codes and scales of blocks
- ``codebooks``: the tables of low-bit types
- ``trellis/``: rotated rows, and codes whose values depend on the codes before them
- ``packing``: codes in bytes
- ``lookup``: a linear layer's function straight from its codec
- ``pieces``: a matrix some rows at a time
- ``finite``: is every value of a tensor finite?
- ``shards/``: what this process holds a part of, and others the rest
- ``autocast``: arithmetic on weights keeps its dtype within a forward's autocast
"""

from __future__ import annotations

from . import dense, packed
from .base import Codec
from .registry import (
    codec_for,
    find_codec,
    on_demand,
    protect_storage_,
    register_codec,
    registered_codec,
    shielded_storage,
)

on_demand.update(bitsandbytes=f"{__name__}.bnb", transformers=f"{__name__}.conv1d")

__all__ = [
    "Codec",
    "codec_for",
    "dense",
    "find_codec",
    "packed",
    "protect_storage_",
    "register_codec",
    "registered_codec",
    "shielded_storage",
]
