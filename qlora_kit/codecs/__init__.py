"""How a base module keeps its weight: ``read`` gives it in float32 (out, in), ``write_`` stores it.

A codec answers for one storage format and never asks what is done with the weight. One is found by the module's type.

- ``base``: ``Codec``, what every one promises, and the registry
- ``dense``: one floating-point ``weight``: linear, embedding (transposed), convolution (flattened)
- ``conv1d``: transformers' ``Conv1D``, stored (in, out)
- ``packed``: ``PackedLinear``, 2, 3, 4 or 8 bits without a gap
- ``bnb/``: bitsandbytes' 4-bit and int8 linears
- ``quantized``: a quantized matrix as data: codes, scales, and what reads them back
- ``blockwise``: codes and scales of blocks
- ``codebooks``: the tables of low-bit types
- ``packing``: codes in bytes
- ``lookup``: a linear layer's function straight from its codec
- ``finite``: is every value of a tensor finite?
"""

from __future__ import annotations

from . import dense, packed
from .base import Codec, codec_for, find_codec, protect_storage_, register_codec, shielded_storage

__all__ = [
    "Codec",
    "codec_for",
    "dense",
    "find_codec",
    "packed",
    "protect_storage_",
    "register_codec",
    "shielded_storage",
]
