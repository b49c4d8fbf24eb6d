"""Products on a CPU, some rows of the weight at a time: looked up in float32 and multiplied with in the cache.

Float32 is what the look-up gives, and what every CPU multiplies in well. Where the CPU has instructions for 16 bits,
products of many rows of inputs are several times faster in these, and then the whole weight is laid out in the dtype
first: 16-bit sums over pieces would round each piece, and these products want large matrices. Without such
instructions torch's 16-bit products, the gradient's above all, take many times what float32's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from .look_up import chunks
from .matrix import PackedMatrix
from .native import product_dtype
from .reading import Reader
from .scratch import scratch
from .way import Way

# Values of the weight that are multiplied with at a time, for few rows of inputs and for many: then a product
# adds to all of the gradient, which is better done seldom.
_PIECE, _LARGE_PIECE = 1 << 19, 1 << 20
# Rows of inputs up to which the product takes less time than the look-up, in any dtype.
_FEW_ROWS = 16


class OnCpu(Way):
    """See the module's text."""

    def takes(self, matrix: PackedMatrix, dtype: torch.dtype) -> bool:
        return matrix.codes.device.type == "cpu" and matrix.is_plain

    def dense(self, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
        whole = scratch((matrix.numel,), dtype, matrix.codes.device)
        reader = Reader(matrix)
        if dtype == torch.float32:
            return reader.read_(0, whole).view(matrix.shape)
        for part in chunks(matrix.numel, matrix.unit, whole.device):
            values = scratch((part.stop - part.start,), torch.float32, whole.device)
            whole[part] = reader.read_(part.start, values)
        return whole.view(matrix.shape)

    def linear(self, x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
        flat = x.reshape(prod(x.shape[:-1]), x.shape[-1])
        if not in_pieces(flat):
            return super().linear(x, matrix, bias)
        out, wide = x.new_empty(len(flat), matrix.shape[0]), flat.to(_wide(x.dtype))
        bias = None if bias is None else bias.to(wide.dtype)
        for rows, weight in _pieces(matrix, wide):
            out[:, rows] = F.linear(wide, weight, None if bias is None else bias[rows])
        return out.view(*x.shape[:-1], matrix.shape[0])

    def gradient(self, grad: Tensor, matrix: PackedMatrix) -> Tensor:
        flat = grad.reshape(prod(grad.shape[:-1]), grad.shape[-1])
        if not in_pieces(flat):
            return super().gradient(grad, matrix)
        total = torch.zeros(len(flat), matrix.shape[1], dtype=_wide(grad.dtype), device=grad.device)
        for rows, weight in _pieces(matrix, total):
            total.addmm_(flat[:, rows].to(total.dtype), weight)
        return total.to(grad.dtype).view(*grad.shape[:-1], matrix.shape[1])


def in_pieces(flat: Tensor) -> bool:
    """Whether the product of the rows ``flat`` is computed piece by piece in float32 or float64."""
    return flat.dtype == _wide(flat.dtype) or len(flat) <= _FEW_ROWS or product_dtype("cpu", flat.dtype) != flat.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _pieces(matrix: PackedMatrix, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of the weight at a time, in the dtype of ``like`` and for products with as many rows; each is in memory
    that the next overwrites."""
    reader, (count, width) = Reader(matrix), matrix.shape
    step = max(1, (_PIECE if len(like) <= _FEW_ROWS else _LARGE_PIECE) // max(1, width))
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        memory = scratch((reader.room(rows),), torch.float32, matrix.codes.device)
        yield rows, reader.rows(rows, memory).to(like.dtype)
