"""What the best low-rank part of a difference is, in float64 through numpy's SVD of the whole matrix."""

from __future__ import annotations

import numpy as np


def squared_values(difference: np.ndarray) -> np.ndarray:
    """Squares of the singular values, descending."""
    return np.linalg.svd(difference.astype(np.float64), compute_uv=False) ** 2


def best_share(difference: np.ndarray, rank: int) -> float:
    """The largest share of the squared norm that any matrix of this rank holds."""
    squares = squared_values(difference)
    return float(squares[:rank].sum() / squares.sum())


def least_rank(difference: np.ndarray, energy: float) -> int:
    """The smallest rank whose best approximation holds the share ``energy``."""
    squares = squared_values(difference)
    shares = np.cumsum(squares) / squares.sum()
    return int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1
