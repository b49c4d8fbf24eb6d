"""How packed weights are multiplied with, device by device: plain tensors in and out.

It knows no modules, no names of types and no gradients: a matrix comes as codes, a table and scales.

``dense``, ``linear`` and ``gradient`` ask the ways in ``WAYS`` in turn, and the first that takes the matrix and the
dtype does it; nothing else decides. Looking up in torch fits everything and is what the others are measured against.

- ``matrix``: ``PackedMatrix``, packed codes, table and block scales as data
- ``look_up``: from packed codes to table values, in torch
- ``window``: what the value of a code depends on that has a memory of those before it
- ``look_up_windows``: from such codes to values, packed
- ``reading``: a matrix's exact float32 values, any part of them, in torch
- ``way``: what a way of multiplying gives, and the one for every device
- ``on_cpu``: in pieces that stay in the cache
- ``native``: the dtype to multiply in on a device
- ``scratch``: memory for a dense weight that is multiplied with once
- ``on_cuda``: which kernel is launched, with what tiles
- ``triton_code``: the kernels; imported on demand, and the only file that knows triton
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import PackedMatrix
from .on_cpu import OnCpu
from .on_cuda import OnCuda
from .way import Way

# First match wins; the last takes everything.
WAYS: list[Way] = [OnCuda(), OnCpu(), Way()]


def way_for(matrix: PackedMatrix, dtype: torch.dtype) -> Way:
    """How products of ``matrix`` in ``dtype`` are computed here."""
    return next(way for way in WAYS if way.takes(matrix, dtype))


def dense(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The (out, in) weight in ``dtype``, to be multiplied with at once: it may lie in memory that the next call in this
    thread overwrites."""
    return way_for(matrix, dtype).dense(matrix, dtype)


def linear(x: Tensor, matrix: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., in) to (..., out), in the dtype of ``x``, which ``bias`` (out,) has too."""
    return way_for(matrix, x.dtype).linear(x, matrix, bias)


def gradient(grad: Tensor, matrix: PackedMatrix) -> Tensor:
    """grad W, the gradient of ``linear``'s input: (..., out) to (..., in), in the dtype of ``grad``."""
    return way_for(matrix, grad.dtype).gradient(grad, matrix)


__all__ = ["WAYS", "PackedMatrix", "Way", "dense", "gradient", "linear", "way_for"]
