"""How two language models' outputs agree, in float64 numpy, a token at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def next_token_loss(
    logits: Sequence[np.ndarray], ids: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
) -> float:
    """The mean over tokens, but for each row's first and for padding."""
    lost = []
    for batch, tokens, mask in zip(logits, ids, masks, strict=True):
        for row in range(len(tokens)):
            for place in range(1, tokens.shape[1]):
                if mask is None or mask[row, place]:
                    lost.append(-log_probabilities(batch[row, place - 1])[tokens[row, place]])
    return float(np.mean(lost))


def agreement(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], masks: Sequence[np.ndarray | None]
) -> dict[str, float]:
    """Of logits (batch, tokens, vocabulary), without what is padding."""
    tokens = same = 0
    divergence = lost = whole = 0.0
    for one, other, mask in zip(before, after, masks, strict=True):
        for place in np.ndindex(one.shape[:-1]):
            if mask is None or mask[place]:
                x, y = one[place].astype(np.float64), other[place].astype(np.float64)
                p, q = log_probabilities(x), log_probabilities(y)
                divergence += float((np.exp(p) * (p - q)).sum())
                same += int(x.argmax() == y.argmax())
                lost += float(((y - x) ** 2).sum())
                whole += float((x**2).sum())
                tokens += 1
    return {"tokens": tokens, "error": (lost / whole) ** 0.5, "kl": divergence / tokens, "top1": same / tokens}
