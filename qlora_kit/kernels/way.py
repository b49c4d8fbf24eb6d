"""What a way of multiplying gives; as it stands, the way for every device and dtype: the whole weight, looked up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .matrix import PackedMatrix
from .reading import Reader


class Way:
    """A way to multiply with packed weights. Biases, outputs and gradients have their input's dtype."""

    def takes(self, matrix: PackedMatrix, dtype: torch.dtype) -> bool:
        """Whether this way can multiply with ``matrix`` in ``dtype``, where its tensors are."""
        return True

    def dense(self, matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
        """(out, in) in ``dtype``, perhaps in memory that the next call overwrites."""
        memory = matrix.table.new_empty(matrix.numel, dtype=torch.float32, device=matrix.codes.device)
        if not memory.is_meta:
            Reader(matrix).read_(0, memory)
        return memory.view(matrix.shape).to(dtype)

    def linear(self, x: Tensor, matrix: PackedMatrix, bias: Tensor | None) -> Tensor:
        """x W^T + b: (..., in) to (..., out)."""
        return F.linear(x, self.dense(matrix, x.dtype), bias)

    def gradient(self, grad: Tensor, matrix: PackedMatrix) -> Tensor:
        """grad W: (..., out) to (..., in)."""
        return grad.matmul(self.dense(matrix, grad.dtype))
