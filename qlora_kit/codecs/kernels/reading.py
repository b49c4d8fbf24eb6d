"""A packed matrix's values in float32, exactly ``table[code] * scale + shift``: what all other ways are measured by.

Looking up and scaling go over chunks that stay in the cache, into memory that the caller has: fresh memory costs more
than the arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..trellis import window
from .look_up import chunks, group_values, look_up_
from .matrix import PackedMatrix


class Reader:
    """Reads one matrix any number of times; what is the same for all its parts is made once."""

    def __init__(self, matrix: PackedMatrix) -> None:
        self.matrix = matrix
        by_code = matrix.table
        if matrix.has_memory:  # first to the codes themselves
            by_code = torch.arange(2**matrix.bits, dtype=torch.uint8, device=matrix.table.device)
        self.groups = group_values(by_code, matrix.bits, keep=matrix.is_plain)
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

    def _look_up_(self, packed: Tensor, out: Tensor) -> Tensor:
        """Overwrite flat ``out`` with the values of the first codes in ``packed``, a row's first among them."""
        matrix = self.matrix
        if not matrix.has_memory:
            return look_up_(packed, matrix.bits, self.groups, out)
        codes = torch.empty(out.numel(), dtype=torch.uint8, device=out.device)
        codes = look_up_(packed, matrix.bits, self.groups, codes).view(-1, matrix.shape[1])
        return out.copy_(window.look_up(codes, matrix.table, matrix.bits).view(-1))

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
