"""A matrix's trellis codes and scales: a scale for each row, fitted by least squares to the codes found at its size."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CodecError
from .search import nearest_paths
from .window import look_up


def sizes(matrix: Tensor) -> Tensor:
    """The root mean square of each row of a rotated matrix, float32 (rows,).

    Raises:
        CodecError: a value is NaN or infinite.
    """
    largest = matrix.abs().amax(1)
    if not largest.isfinite().all():
        raise CodecError(
            "weight: expected rows that are finite in torch.float32 when rotated, found NaN or infinity; load the "
            "weight again, scale it down or leave the module out of the targets"
        )
    # Squares of the smallest and largest values leave float32's range.
    return torch.where(largest > 0, (matrix / off_zero(largest)[:, None]).square().mean(1).sqrt() * largest, largest)


def off_zero(scales: Tensor) -> Tensor:
    """``scales`` to divide by."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


def nearest(matrix: Tensor, table: Tensor, bits: int, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """uint8 codes (rows, width) and float32 scales (rows,) of rotated float32 ``matrix``.

    Args:
        known: scales to be tried too, float32 (rows,): a row that was stored with its own is found again as it was.
    """
    size = sizes(matrix)
    values = matrix / off_zero(size)[:, None]
    codes = nearest_paths(values, table, bits)
    read = look_up(codes, table, bits)
    fitted = (values * read).sum(1) / off_zero(read.square().sum(1))
    if known is None:
        return codes, fitted * size
    in_units = known / off_zero(size)
    again = nearest_paths(values / off_zero(in_units)[:, None], table, bits)
    found, before = read * fitted[:, None], look_up(again, table, bits) * in_units[:, None]
    better = (before - values).square().sum(1) <= (found - values).square().sum(1)
    return torch.where(better[:, None], again, codes), torch.where(better, known, fitted * size)
