"""A matrix some rows at a time: for what is read, checked or compared where a whole second matrix isn't to be held."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

# Entries at a time.
PIECE = 1 << 20


def row_pieces(shape: tuple[int, ...], multiple: int = 1) -> Iterator[slice]:
    """Rows of a matrix, about ``PIECE`` entries at a time, each piece beginning at a multiple of ``multiple`` entries
    in row-major order."""
    rows, width = shape[0], max(1, shape[1])
    unit = multiple // gcd(width, multiple)
    step = max(1, PIECE // (width * unit)) * unit
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def assembled(pieces: Iterator[tuple[slice, Tensor]], shape: tuple[int, int], device: torch.device) -> Tensor:
    """The whole matrix of which ``pieces`` are the rows: float32 ``shape``."""
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    for rows, values in pieces:
        whole[rows] = values
    return whole
