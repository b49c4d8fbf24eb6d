"""Rank-r approximation in float64 by one-sided Jacobi rotations: shares no code path with LAPACK's SVD."""

from __future__ import annotations

import numpy as np


def jacobi_svd(matrix: np.ndarray, sweeps: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(U, S, Vh) of a small matrix, S descending: rotate pairs of columns until all are orthogonal.

    Hestenes (1958). U's columns that belong to a zero singular value are zero.
    """
    work = np.array(matrix, dtype=np.float64)
    flip = work.shape[0] < work.shape[1]
    if flip:
        work = work.T.copy()
    columns = work.shape[1]
    V = np.eye(columns)
    for _ in range(sweeps):
        largest = 0.0
        for i in range(columns - 1):
            for j in range(i + 1, columns):
                a, b = work[:, i] @ work[:, i], work[:, j] @ work[:, j]
                c = work[:, i] @ work[:, j]
                if a * b == 0 or abs(c) <= 1e-15 * np.sqrt(a * b):
                    continue
                largest = max(largest, abs(c) / np.sqrt(a * b))
                tau = (b - a) / (2 * c)
                t = (1.0 if tau >= 0 else -1.0) / (abs(tau) + np.sqrt(1 + tau * tau))
                cos = 1 / np.sqrt(1 + t * t)
                rotation = np.array([[cos, t * cos], [-t * cos, cos]])
                work[:, [i, j]] = work[:, [i, j]] @ rotation
                V[:, [i, j]] = V[:, [i, j]] @ rotation
        if largest < 1e-14:
            break
    S = np.linalg.norm(work, axis=0)
    order = np.argsort(-S)
    S, work, V = S[order], work[:, order], V[:, order]
    U = np.divide(work, S, out=np.zeros_like(work), where=S > 0)
    return (V, S, U.T) if flip else (U, S, V.T)


def best_approximation(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The closest matrix of rank ``rank`` in the Frobenius norm, float64."""
    U, S, Vh = jacobi_svd(matrix)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]
