"""Which Triton kernel is launched on a CUDA device, and with what tiles.

Few rows of inputs (generation): the product takes as long as its weight takes to be read, so codes are dequantized in
the kernel that multiplies and the dense weight never exists. Many rows (training): the weight is dequantized into a
dense matrix that lives for one product, and cuBLAS multiplies. A tile of a matrix product is used once for every tile
of inputs, so dequantizing inside would be repeated for each of them and stand between the tensor cores and their next
tile, while the dense matrix costs one writing and reading of 2 bytes a weight: at a thousand rows a tenth or so of the
product.

Tiles follow from the sizes and are not searched for when a program runs: sums come out the same each time. Where
there are too few tiles of outputs for all processors, the terms are cut into parts, and the parts added up in order.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from .matrix import PackedMatrix
from .way import Way

# Rows of inputs up to which the weight is dequantized while it is multiplied with.
MOST_ROWS_FUSED = 16
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Values that a program dequantizes; sizes of a product's tiles (rows and terms: tensor cores want 16 or more).
_TILE, _ROWS, _OUTS, _TERMS = 1024, 16, 32, 64
# Products and sums are rounded each, as in torch; two tiles on their way fit into the memory of any GPU.
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
# Bits that are counted in indices of 32 bits.
_MOST_INDEX = 2**31 - 1
# Programs that keep a large device busy, and the most parts that terms are cut into for their sake.
_PROGRAMS, _MOST_PARTS = 1024, 8


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


class OnCuda(Way):
    """See the module's text."""

    def takes(self, matrix: PackedMatrix, dtype: torch.dtype) -> bool:
        return matrix.codes.is_cuda and dtype in _DTYPES and matrix.is_plain and _has_triton()

    def dense(self, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
        from . import triton_code

        out = torch.empty(matrix.shape, dtype=dtype, device=matrix.codes.device)
        if matrix.numel:
            with torch.cuda.device_of(matrix.codes):
                launch = triton_code.dequantize[(-(-matrix.numel // _TILE),)]
                launch(out, matrix.numel, **_stored(matrix), TILE=_TILE, **_OPTIONS)
        return out

    def linear(self, x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
        if not _is_fused(x, matrix):
            return super().linear(x, matrix, bias)
        out = _multiply(x, matrix, transposed=False)
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    def gradient(self, grad: Tensor, matrix: PackedMatrix) -> Tensor:
        if not _is_fused(grad, matrix):
            return super().gradient(grad, matrix)
        return _multiply(grad, matrix, transposed=True).to(grad.dtype)


def _is_fused(x: Tensor, matrix: PackedMatrix) -> bool:
    return 0 < prod(x.shape[:-1]) <= MOST_ROWS_FUSED and matrix.numel > 0


def _multiply(x: Tensor, matrix: PackedMatrix, *, transposed: bool) -> Tensor:
    """x W^T, or x W if ``transposed``, in one kernel: float32."""
    from . import triton_code

    outs, terms = reversed(matrix.shape) if transposed else matrix.shape
    rows = prod(x.shape[:-1])
    tiles = -(-outs // _OUTS), -(-rows // _ROWS)
    parts, terms_a_part = _parts(terms, tiles[0] * tiles[1])
    sums = torch.empty(parts, *x.shape[:-1], outs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        triton_code.multiply[(*tiles, parts)](
            x.contiguous(), sums, rows, outs, terms, terms_a_part, matrix.shape[1], **_stored(matrix),
            TRANSPOSED=transposed, ONE_BLOCK=_in_one_block(matrix, _OUTS if transposed else _TERMS),
            ROWS=_ROWS, OUTS=_OUTS, TERMS=_TERMS, **_OPTIONS,
        )  # fmt: skip
    return sums.sum(0) if parts > 1 else sums[0]


def _parts(terms: int, tiles: int) -> tuple[int, int]:
    """Parts that ``terms`` are cut into where there are that many tiles of outputs, and the terms of each."""
    steps = -(-terms // _TERMS)
    parts = max(1, min(_MOST_PARTS, _PROGRAMS // tiles, steps))
    steps_a_part = -(-steps // parts)
    return -(-steps // steps_a_part), steps_a_part * _TERMS


def _in_one_block(matrix: PackedMatrix, count: int) -> bool:
    """Whether ``count`` values of a row, from a multiple of ``count`` on, always lie in one block."""
    return matrix.shape[1] % matrix.blocksize == 0 and matrix.blocksize % count == 0


def _stored(matrix: PackedMatrix) -> dict[str, Any]:
    """What every kernel is told of a matrix, by its parameters' names."""
    from . import triton_code

    scales, shifts = matrix.scales, matrix.shifts
    wide = matrix.numel * matrix.bits > _MOST_INDEX
    return {
        "blocksize": matrix.blocksize,
        "codes": matrix.codes,
        "table": matrix.table,
        "scales": scales.values,
        "scales_absmax": scales.absmax,
        "scales_offset": scales.offset,
        "shifts": None if shifts is None else shifts.values,
        "shifts_absmax": None if shifts is None else shifts.absmax,
        "shifts_offset": None if shifts is None else shifts.offset,
        "scales_table": matrix.scales_table,
        "BITS": matrix.bits,
        "MEMORY": matrix.table.numel().bit_length() - 1,
        "DOUBLE": scales.absmax is not None,
        "SHIFTED": shifts is not None,
        "INDEX": triton_code.tl.int64 if wide else triton_code.tl.int32,
    }
