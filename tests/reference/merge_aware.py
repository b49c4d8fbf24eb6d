"""A layer that computes with a rounded weight, in float64, by the definition of the straight-through gradient.

W_m stands for the rounded weight in the forward pass and in the input's gradient; for the factors the rounding counts
as the identity: the gradient of the whole weight is that of s * B @ A, which the product's chain rule takes apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import branches as plain


def forward(x: np.ndarray, rounded: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x (..., in) -> (..., out) by W_m (out, in)."""
    return plain.linear(x, rounded, bias, [])


def gradients(
    x: np.ndarray, rounded: np.ndarray, branches: Sequence[plain.Branch], grad: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Of <y, grad>: the gradients of x and of the bias, and each branch's (A, B)."""
    of_weight = sum(np.outer(g, row) for g, row in zip(_rows(grad), _rows(x), strict=True))
    factors = [(s * B.T @ of_weight, s * of_weight @ A.T) for A, B, s in branches]
    return grad @ rounded, _rows(grad).sum(axis=0), factors


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])
