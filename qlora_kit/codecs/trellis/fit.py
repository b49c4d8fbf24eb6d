"""A matrix's trellis codes and scales: a scale for each row, fitted by least squares to the codes found at its size."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CodecError
from ...kernels.window import look_up
from .search import nearest_paths

# Columns that tell whether a row is one of codes and a scale, and the error that float32's sums leave of such a row,
# relative to its size; the nearest codes leave a tenth or more of a row that isn't.
_TELLING, _ON_GRID = 32, 1e-4


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
        known: scales that rows may have been stored with, float32 (rows,): a row that was read from codes with its own
            is found again as it was. From its values alone it would be given others, whose error isn't 0.
    """
    size = sizes(matrix)
    codes, scales = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device), torch.empty_like(size)
    rest = torch.ones_like(size, dtype=torch.bool)
    if known is not None:
        rest = ~_stored_with_(codes, matrix, size, table, bits, known)
        scales = torch.where(rest, scales, known)
    if rest.any():
        values = matrix[rest] / off_zero(size[rest])[:, None]
        codes[rest] = found = nearest_paths(values, table, bits)
        read = look_up(found, table, bits)
        scales[rest] = (values * read).sum(1) / off_zero(read.square().sum(1)) * size[rest]
    return codes, scales


def _stored_with_(codes: Tensor, matrix: Tensor, size: Tensor, table: Tensor, bits: int, known: Tensor) -> Tensor:
    """Which rows of ``matrix`` read as codes with ``known`` scales, bool (rows,); their codes are written to ``codes``.
    Their first columns tell nearly all others."""
    on_grid = known != 0
    for columns in (slice(0, _TELLING), slice(None)):
        values = matrix[on_grid, columns] / known[on_grid, None]
        found = nearest_paths(values, table, bits)
        error = (look_up(found, table, bits) - values).square().mean(1).sqrt() * known[on_grid].abs()
        same = error <= _ON_GRID * size[on_grid]
        if columns.stop is None:
            codes[on_grid] = found
        on_grid[on_grid.clone()] = same
    return on_grid
