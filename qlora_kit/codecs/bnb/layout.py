"""Where a 4-bit weight's codes and scales are: pure tensor work on a ``QuantState``-like object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import blockwise

_PACK_ROWS = 32  # rows that the CPU inference layout interleaves


def is_repacked(state: Any) -> bool:
    return getattr(state, "packing_format_for_cpu", False)


def standard_bytes(stored: Tensor, state: Any) -> Tensor:
    """The packed codes as flat uint8 in row-major order, whatever the storage dtype or layout.

    The CPU inference layout takes 32 rows at a time. For each pair of columns it lists the 64 codes row by
    row and stores the first 32 in the low nibbles of 32 bytes, the last 32 in the high ones.
    """
    stored = stored.view(torch.uint8)
    if not is_repacked(state):
        return stored.reshape(-1)
    rows, columns = state.shape
    interleaved = stored.reshape(rows // _PACK_ROWS, columns // 2, 32)
    codes = torch.cat([interleaved & 0xF, interleaved >> 4], dim=-1)
    codes = codes.view(rows // _PACK_ROWS, columns // 2, _PACK_ROWS, 2).transpose(1, 2)
    return ((codes[..., 0] << 4) | codes[..., 1]).reshape(-1)


def scales_of(state: Any) -> Tensor:
    """One float32 scale per block in row-major order, double quantization undone as bitsandbytes does."""
    if is_repacked(state):
        return state.absmax.t().reshape(-1).float()
    if not state.nested:
        return state.absmax.reshape(-1).float()
    inner = state.state2
    scales = blockwise.dequantize(state.absmax, inner.code, inner.absmax.float(), inner.blocksize)
    return (scales + state.offset.float()).reshape(-1)
