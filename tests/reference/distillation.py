"""Divergence from a distribution of which the likeliest words are known, word by word in float64 numpy."""

from __future__ import annotations

import numpy as np


def divergence(logits: np.ndarray, ids: np.ndarray, logs: np.ndarray) -> float:
    """The sum over rows of KL(p || q) between what is known of p, the words ``ids`` (n, k) with their log-probabilities
    ``logs`` and all others as one, and the same parts of q = softmax(``logits``) (n, words)."""
    total = 0.0
    for row, known, chances in zip(logits.astype(np.float64), ids, np.exp(logs.astype(np.float64)), strict=True):
        q = np.exp(row - row.max())
        q /= q.sum()
        others = [word for word in range(len(row)) if word not in set(known.tolist())]
        parts = [(float(p), float(q[word])) for p, word in zip(chances, known, strict=True)]
        if others:
            parts.append((1 - float(chances.sum()), float(q[others].sum())))
        total += sum(p * np.log(p / own) for p, own in parts if p > 0)
    return float(total)


def slope(logits: np.ndarray, ids: np.ndarray, logs: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Its gradient by ``logits``, by differences."""
    found = np.zeros(logits.shape)
    for place in np.ndindex(*logits.shape):
        ends = []
        for sign in (1, -1):
            moved = logits.astype(np.float64)
            moved[place] += sign * step
            ends.append(divergence(moved, ids, logs))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found
