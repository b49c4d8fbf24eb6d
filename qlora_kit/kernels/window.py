"""What a trellis code's value depends on: the last bits of its row's stream, not its own bits alone.

The codes of a row, b bits each, the first lowest, are one stream of bits. Value t is ``table[number]``, with the number
made of the ``memory`` bits of the stream that end with code t; before the row's first code there are zeros. So each
code shares all but b bits of its number with the one before: that is the trellis, with 2^memory states, of which each
is reached from 2^b others (bit-shift trellis, as in Tseng et al. 2024, QTIP, arXiv 2406.11235).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def numbers(codes: Tensor, bits: int, memory: int) -> Tensor:
    """The numbers, int32 (rows, width), of uint8 ``codes`` (rows, width), whole rows each."""
    wide = codes.int()
    before = -(-memory // bits) - 1  # codes before its own that a value depends on, the first perhaps in part
    padded = F.pad(wide, (before, 0))
    found = wide << before * bits
    for place in range(before):
        found |= padded[:, place : place + wide.shape[1]] << place * bits
    return found >> (before + 1) * bits - memory


def look_up(codes: Tensor, table: Tensor, bits: int) -> Tensor:
    """``table`` (2^memory,) at the numbers of uint8 ``codes`` (rows, width), in the dtype of ``table``."""
    memory = table.numel().bit_length() - 1
    return table.index_select(0, numbers(codes, bits, memory).view(-1)).view(codes.shape)
