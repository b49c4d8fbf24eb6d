"""A 4-bit weight through bitsandbytes' own dequantization, and where that reads it right."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm
from typing import Any

import torch
from bitsandbytes.functional import QuantState
from torch import Tensor

from ..pieces import row_pieces
from .layout import scales_of
from .quant_state import state_of

#: What it gives.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernel_pieces(stored: Tensor, state: Any, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in ``dtype`` as bitsandbytes dequantizes it, some rows at a time on a CPU: fresh memory for all of it
    at once costs more there than filling it."""
    stored, scales, (rows, width) = stored.view(torch.uint8).view(-1, 1), scales_of(state), state.shape
    kernel, blocksize = torch.ops.bitsandbytes.dequantize_4bit.default, state.blocksize
    at_once = stored.device.type != "cpu"
    for piece in [slice(0, rows)] if at_once else row_pieces((rows, width), lcm(blocksize, 2)):
        begin, end = piece.start * width, piece.stop * width
        codes, absmax = stored[begin // 2 : -(-end // 2)], scales[begin // blocksize : -(-end // blocksize)]
        yield piece, kernel(codes, absmax, blocksize, state.quant_type, (piece.stop - piece.start, width), dtype)


def kernel_is_right(module: Any, x: Tensor) -> bool:
    """Whether bitsandbytes' own forward and backward of ``module`` on ``x`` use the right scales and dtype.

    Its CPU kernels start a new block with each row, which holds only when a row is a whole number of blocks; and in
    float64 they compute garbage.
    """
    state = state_of(module) if x.device.type == "cpu" else None
    return state is None or not misread(module, state)


def misread(module: Any, state: QuantState) -> bool:
    """Whether its CPU kernels misread this module, which is quantized and has that state."""
    return module.in_features % state.blocksize != 0 or module.compute_dtype is torch.float64
