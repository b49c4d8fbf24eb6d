"""Coordinate descent over codes in float64 numpy: every level of every value is tried, and its whole error computed."""

from __future__ import annotations

import numpy as np


def row_error(error: np.ndarray, moments: np.ndarray) -> float:
    """e R e^T."""
    return float(error @ moments @ error)


def regrets(
    base: np.ndarray, delta: np.ndarray, moments: np.ndarray, reachable: np.ndarray, found: np.ndarray
) -> np.ndarray:
    """By how much ``found`` isn't the choice of a sweep over the columns towards ``base + delta``.

    Row after row, columns by falling mean square, a value is set to the one of its reachable values that leaves the
    least error, values before it being as found and those after it as in the base. Of every value the regret is how
    much more error the found one leaves than the best, in units of R_kk times the square of what its levels span.

    Args:
        reachable: (out, in, levels), what each value can be. found: (out, in), of these.
    """
    order = sorted(range(base.shape[1]), key=lambda column: -moments[column, column])
    result = np.zeros(base.shape)
    for i, target in enumerate(base + delta):
        row = base[i].copy()
        for k in order:
            errors = []
            for value in [found[i, k], *reachable[i, k]]:
                row[k] = value
                errors.append(row_error(target - row, moments))
            row[k] = found[i, k]
            span = float(np.ptp(reachable[i, k]))
            result[i, k] = (errors[0] - min(errors)) / (moments[k, k] * span**2) if span else 0.0
    return result


def share(change: np.ndarray, delta: np.ndarray, moments: np.ndarray) -> float:
    """<change, delta>_R / <delta, delta>_R, a row at a time."""
    arrived = sum(float(c @ moments @ d) for c, d in zip(change, delta, strict=True))
    return arrived / sum(row_error(d, moments) for d in delta)


def missing(change: np.ndarray, A: np.ndarray, B: np.ndarray, moments: np.ndarray) -> float:
    """What isn't there of the delta B A along its own singular directions under R, as a share of the delta: the norm of
    U^T (delta - change) R^1/2 V for the left and right singular vectors of delta R^1/2."""
    values, vectors = np.linalg.eigh(moments)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    U, sizes, Vh = np.linalg.svd(B @ A @ root)
    kept = int((sizes > 1e-6 * sizes[0]).sum())
    left = U[:, :kept].T @ (B @ A - change) @ root @ Vh[:kept].T
    return float(np.linalg.norm(left) / np.linalg.norm(sizes))
