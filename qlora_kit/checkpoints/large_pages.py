"""Memory that is filled at once and let go of as a whole, in pages as large as the system gives them.

A page is zeroed at its first touch, which takes about a microsecond: for copies of all weights of a model, in pages of
4 KiB, that is longer than it takes to write them.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

# Bytes that are asked of the system at a time; it gives them page by page, as they are touched.
_PIECE = 1 << 24
# Where a tensor may begin.
_ALIGNED = 64


class LargePages:
    """Copies of tensors, one after the other; their memory is the system's again when the last of them is gone."""

    def __init__(self) -> None:
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """``tensor`` on the CPU, copied: of its shape and dtype, contiguous."""
        if not tensor.nbytes:
            return tensor.to("cpu", copy=True)
        begin = -(-self._used // _ALIGNED) * _ALIGNED
        if begin + tensor.nbytes > len(self._piece):
            self._piece, begin = _mapped(max(_PIECE, tensor.nbytes)), 0
        self._used = begin + tensor.nbytes
        return self._piece[begin : self._used].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _mapped(count: int) -> Tensor:
    """``count`` bytes of new memory. (A mapping that is shared with other processes gets no large pages.)"""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(count, dtype=torch.uint8)
    memory = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
