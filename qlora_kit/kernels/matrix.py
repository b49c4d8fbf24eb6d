"""Packed codes, their table and their block scales as data: what every way of multiplying starts from."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Protocol

import torch
from torch import Tensor


class BlockScales(Protocol):
    """Scales (or shifts) of blocks as stored: float32 ``values``, or 8-bit codes of them with ``absmax`` and ``offset``
    (double quantization: scale = table[code] * absmax + offset, with an absmax for 256 codes)."""

    @property
    def values(self) -> Tensor: ...
    @property
    def absmax(self) -> Tensor | None: ...
    @property
    def offset(self) -> Tensor | None: ...
    def read(self) -> Tensor:
        """float32 (blocks,)."""
        ...


@dataclass(frozen=True)
class PackedMatrix:
    """value i = table[code i] * scale of block i // blocksize, plus its shift; row-major, without a gap anywhere. A
    table of more than 2^bits values is looked up by more bits than a code's own, see ``window``.

    Attributes:
        codes: uint8, flat: code i takes the bits i * bits and on, the lowest of a byte first.
        bits: 2, 3, 4 or 8.
        shape: (out, in); blocks may straddle rows, and bytes too.
        blocksize: values per scale.
        table: float32 (2^memory,), by code; with more bits than a code's, blocks are rows.
        scales, shifts: of blocks; shifts only for types with a range.
        scales_table: float32 (256,), what 8-bit scales are codes of; None where no scales are.
    """

    codes: Tensor
    bits: int
    shape: tuple[int, int]
    blocksize: int
    table: Tensor
    scales: BlockScales
    shifts: BlockScales | None = None
    scales_table: Tensor | None = None

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def has_memory(self) -> bool:
        """Whether a value depends on the codes before its own too."""
        return self.table.numel() > 2**self.bits

    @property
    def unit(self) -> int:
        """Values at whose multiples both a block and a byte begin."""
        return lcm(self.blocksize, 8)

    @property
    def is_plain(self) -> bool:
        """Whether these are tensors with values of their own: on no meta device, not faked, and not traced."""
        return type(self.table) is Tensor and not self.codes.is_meta and not torch.compiler.is_compiling()
