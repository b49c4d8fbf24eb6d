"""Combining adapters in float64 numpy, written from the published definitions on dense matrices.

A branch (A, B, s) stands for s * B @ A. Nothing here is thin, fast or shared with the code under test: sums are
dense, decompositions are of dense matrices, pruning sorts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Branch = tuple[np.ndarray, np.ndarray, float]


def deltas(branches: Sequence[Branch]) -> list[np.ndarray]:
    return [s * np.einsum("or,ri->oi", np.float64(B), np.float64(A)) for A, B, s in branches]


def weighted_sum(branches: Sequence[Branch], weights: Sequence[float]) -> np.ndarray:
    """Task arithmetic (Ilharco et al. 2022): sum of w_i s_i B_i A_i."""
    return np.sum([w * d for w, d in zip(weights, deltas(branches), strict=True)], axis=0)


def truncated(matrix: np.ndarray, rank: int) -> np.ndarray:
    U, S, Vh = np.linalg.svd(matrix, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def prune(array: np.ndarray, density: float) -> np.ndarray:
    """The floor(density * size) entries of largest magnitude; the rest zero."""
    kept = int(density * array.size)
    order = np.argsort(-np.abs(array).ravel(), kind="stable")
    result = np.zeros(array.size)
    result[order[:kept]] = array.ravel()[order[:kept]]
    return result.reshape(array.shape)


def elect(arrays: Sequence[np.ndarray], method: str) -> np.ndarray:
    """The majority sign; a tie is plus."""
    votes = np.sum(arrays if method == "total" else np.sign(arrays), axis=0)
    return np.where(votes < 0, -1.0, 1.0)


def disjoint_mean(arrays: Sequence[np.ndarray], weights: Sequence[float], method: str) -> np.ndarray:
    """Entry by entry, in a loop: the mean of weight * value over values of the elected sign."""
    signs = elect(arrays, method)
    result = np.zeros_like(signs)
    for place in np.ndindex(signs.shape):
        agreeing = [w * a[place] for w, a in zip(weights, arrays, strict=True) if np.sign(a[place]) == signs[place]]
        result[place] = np.mean(agreeing) if agreeing else 0.0
    return result


def merge(
    arrays: Sequence[np.ndarray], weights: Sequence[float], way: str, density: float, method: str = "total"
) -> np.ndarray:
    """ "linear", "magnitude_prune" or "ties" of arrays."""
    pruned = [np.float64(a) if way == "linear" else prune(np.float64(a), density) for a in arrays]
    if way == "ties":
        return disjoint_mean(pruned, weights, method)
    return np.sum([w * a for w, a in zip(weights, pruned, strict=True)], axis=0)


def on_factors(
    branches: Sequence[Branch], weights: Sequence[float], way: str, density: float = 1.0, method: str = "total"
) -> np.ndarray:
    """B A of the factors merged apart, each with the root of |w s|, the sign on A."""
    products = np.array([w * s for w, (_, _, s) in zip(weights, branches, strict=True)])
    roots = np.sqrt(np.abs(products))
    A = merge([A for A, _, _ in branches], roots * np.sign(products), way, density, method)
    B = merge([B for _, B, _ in branches], roots, way, density, method)
    return B @ A


def on_deltas(
    branches: Sequence[Branch], weights: Sequence[float], way: str, density: float, method: str = "total"
) -> np.ndarray:
    return merge(deltas(branches), weights, way, density, method)


def knots(branches: Sequence[Branch], weights: Sequence[float], density: float, method: str = "total") -> np.ndarray:
    """Stoica et al. 2024: the SVD of the deltas side by side, TIES on diag(S) V_i^T, back through U."""
    found = deltas(branches)
    U, S, Vh = np.linalg.svd(np.concatenate(found, axis=1), full_matrices=False)
    rank = int((1e-9 * S[0] < S).sum())
    turned = np.sign(U[np.abs(U).argmax(axis=0), np.arange(len(S))])  # each column's largest entry is positive
    U, Vh = U * turned, Vh * turned[:, None]
    width = found[0].shape[1]
    scaled = S[:rank, None] * Vh[:rank]
    pieces = [scaled[:, i * width : (i + 1) * width] for i in range(len(found))]
    return U[:, :rank] @ merge(pieces, weights, "ties", density, method)


def iso_c(branches: Sequence[Branch], weights: Sequence[float], rank: int | None = None) -> np.ndarray:
    """Marczak et al. 2025, over the singular values that aren't zero, or the ``rank`` largest."""
    U, S, Vh = np.linalg.svd(weighted_sum(branches, weights), full_matrices=False)
    kept = int((1e-9 * S[0] < S).sum()) if rank is None else rank
    return S[:kept].mean() * U[:, :kept] @ Vh[:kept]
