"""Memory for a dense weight that is multiplied with once and forgotten, reused from call to call.

A layer of a quantized model needs its weight in full for one product, forward and backward. Fresh memory for it costs
more than filling it: on a CPU every page is mapped and zeroed again, which takes as long as the dequantization itself.
On accelerators torch's allocator keeps freed memory at hand already, so there it is asked.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

# Larger than most layers' weights; a vocabulary's, once, needn't be held for the life of the process.
MOST_BYTES = 256 << 20


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}


_kept = _Kept()


def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor, good until this thread's next call with the same dtype and device."""
    count = prod(shape)
    if device.type != "cpu" or count * dtype.itemsize > MOST_BYTES or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _kept.buffers.get(dtype)
    if buffer is None or buffer.numel() < count:
        with torch.inference_mode(False):  # memory made inside it could serve no training afterwards
            buffer = _kept.buffers[dtype] = torch.empty(count, dtype=dtype, device=device)
    return buffer[:count].view(shape)


def gathered(
    pieces: Iterator[tuple[slice, Tensor]], shape: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The matrix of which ``pieces`` are the rows, in ``dtype``: in reused memory, or the piece itself where one is
    all of it."""
    whole: Tensor | None = None
    for rows, values in pieces:
        if len(values) == shape[0] and values.dtype == dtype:
            return values
        whole = scratch(shape, dtype, device) if whole is None else whole
        whole[rows] = values
    return scratch(shape, dtype, device) if whole is None else whole


def is_scratch(tensor: Tensor) -> bool:
    """Whether ``tensor`` lies in this thread's reused memory, and so may be written to."""
    buffer = _kept.buffers.get(tensor.dtype)
    return buffer is not None and tensor.device.type == "cpu" and tensor.data_ptr() == buffer.data_ptr()


def release_scratch() -> None:
    """Let go of this thread's reused memory."""
    _kept.buffers.clear()
