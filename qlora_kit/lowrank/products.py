"""The product of a factor pair, how large a matrix is, and how much of a product is in a weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..codecs.autocast import without_autocast
from ..codecs.pieces import row_pieces
from ..errors import ConfigError

# Norms between these have lost nothing to the squares that float32 can't hold; others are taken again in float64, which
# is several times slower.
SAFE_NORMS = 1e-12, 1e15


def delta(A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """``scaling * B @ A`` in float32, whatever the factors' dtype and also under autocast.

    Args:
        A: (rank, in). B: (out, rank).

    Returns:
        float32 (out, in), connected to the factors' autograd graph.

    Raises:
        ConfigError: the factors aren't two matrices with a common rank.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ConfigError(
            "A and B: expected shapes (rank, in) and (out, rank) with one rank, found "
            f"{tuple(A.shape)} and {tuple(B.shape)}; pass the canonical factors of one adapter"
        )
    with without_autocast(B.device):
        return (B.float() @ A.float()) * scaling


def norm(matrix: Tensor) -> float:
    """The Frobenius norm. Rows are summed up in float32, whose few thousand squares lose nothing that counts, and their
    squares in float64: norms that differ in the seventh digit are compared."""
    found = float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))
    if SAFE_NORMS[0] < found < SAFE_NORMS[1]:
        return found
    parts = (torch.linalg.vector_norm(matrix[rows], dtype=torch.float64) for rows in row_pieces(matrix.shape))
    return math.hypot(*(float(part) for part in parts))


def add_product_(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``weight`` (out, in) plus B (out, rank) @ A (rank, in), in its place and without a second matrix of its size."""
    with without_autocast(weight.device):
        return weight.addmm_(B, A)


@torch.no_grad()
def share_arrived(lost: Tensor, B: Tensor, gram: Tensor) -> float:
    """The share <Q - base, B A>_R / <B A, B A>_R of a delta B A that is in a weight Q, by inputs of second moments R; 1
    is all of it, and what is said of a delta without effect.

    What R is, is the caller's to say: the identity measures the weight itself, moments what a text has shown of the
    layer's output, and damped moments count what it hasn't shown as well, a little.

    Args:
        lost: (base + B A - Q) R A^T, (out, rank): what is missing, by the adapter's own features A x. Takes a few rows
            of the weight at a time and nothing of its size.
        B: (out, rank).
        gram: A R A^T, (rank, rank).
    """
    B = B.double()
    size = float(((B @ gram.double()) * B).sum())
    return 1 - float((lost.double() * B).sum()) / size if size > 0 else 1.0
