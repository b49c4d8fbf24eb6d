"""A packed matrix's values in float32, exactly ``table[code] * scale + shift``: what all other ways are measured by.

Looking up and scaling go over chunks that stay in the cache, into memory that the caller has: fresh memory costs more
than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .look_up import chunks, group_values, look_up_
from .look_up_windows import Windows
from .matrix import PackedMatrix


class Reader:
    """Reads one matrix any number of times; what is the same for all its parts is made once."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix
        table, bits, keep = matrix.table, matrix.bits, matrix.is_plain
        self._look_up_: Callable[[Tensor, Tensor], Tensor]
        if matrix.has_memory:
            self._look_up_ = Windows(table, bits, matrix.shape[1], keep=keep).look_up_
        else:
            groups = group_values(table, bits, keep=keep)
            self._look_up_ = lambda packed, out: look_up_(packed, bits, groups, out)
        self.scales = matrix.scales.read()
        self.shifts = None if matrix.shifts is None else matrix.shifts.read()

    def read_(self, begin: int, out: Tensor) -> Tensor:
        """Overwrite flat float32 ``out`` with as many values from flat index ``begin`` on, and return it; ``begin`` is
        a multiple of the matrix's unit."""
        matrix, blocksize = self.matrix, self.matrix.blocksize
        for part in chunks(out.numel(), matrix.unit, out.device):
            first = begin + part.start
            values = self._look_up_(matrix.codes[first * matrix.bits // 8 :], out[part])
            blocks = slice(first // blocksize, -(-(first + values.numel()) // blocksize))
            scale_blocks_(values, self.scales[blocks], blocksize, None if self.shifts is None else self.shifts[blocks])
        return out

    def rows(self, rows: slice, memory: Tensor | None = None) -> Tensor:
        """The values of some rows, float32 (rows, in), in flat ``memory`` of ``room(rows)`` values or in new."""
        width, count = self.matrix.shape[1], self.room(rows)
        memory = self.scales.new_empty(count, dtype=torch.float32) if memory is None else memory[:count]
        skipped = rows.start * width % self.matrix.unit
        return self.read_(rows.start * width - skipped, memory)[skipped:].view(-1, width)

    def room(self, rows: slice) -> int:
        """Values that reading ``rows`` takes memory for: reading begins at a multiple of the unit before them."""
        width = self.matrix.shape[1]
        return (rows.stop - rows.start) * width + rows.start * width % self.matrix.unit


def scale_blocks_(values: Tensor, scales: Tensor, blocksize: int, shifts: Tensor | None = None) -> Tensor:
    """Multiply flat ``values`` in place by their blocks' scales and add the shifts; returns them."""
    whole, rest = divmod(values.numel(), blocksize)
    _scale_whole_blocks_(values[: whole * blocksize].view(whole, blocksize), scales[:whole], shifts)
    if rest:
        last = None if shifts is None else shifts[whole:]
        _scale_whole_blocks_(values[None, whole * blocksize :], scales[whole:], last)
    return values


def _scale_whole_blocks_(blocks: Tensor, scales: Tensor, shifts: Tensor | None) -> None:
    blocks.mul_(scales[:, None])
    if shifts is not None:
        blocks.add_(shifts[: len(blocks), None])
