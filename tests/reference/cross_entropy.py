"""Cross-entropy of a linear head in float64 numpy, token by token, with its gradients by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Scored:
    """The loss, and its gradients by hidden states, weight and bias."""

    loss: float
    hidden: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def scored(
    hidden: np.ndarray,
    weight: np.ndarray,
    target: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    scale: float = 1.0,
    cap: float | None = None,
    ignored: int = -100,
    smoothing: float = 0.0,
    divisor: float | None = None,
) -> Scored:
    """hidden (N, H), weight (V, H), target (N,); logits are capped(scale * (W h + b)); the sum over tokens that count
    is divided by ``divisor``, or by their number."""
    words = len(weight)
    bias = np.zeros(words) if bias is None else bias
    found = Scored(0.0, np.zeros_like(hidden), np.zeros_like(weight), np.zeros(words))
    counted = [i for i, word in enumerate(target) if word != ignored]
    share = 1.0 / (len(counted) if divisor is None else divisor)
    for i in counted:
        z = scale * (weight @ hidden[i] + bias)
        y = z if cap is None else cap * np.tanh(z / cap)
        p = np.exp(y - y.max())
        p /= p.sum()
        wanted = np.full(words, smoothing / words)
        wanted[target[i]] += 1 - smoothing
        found.loss -= share * float(wanted @ np.log(p))
        slope = share * (p - wanted) * scale * (1.0 if cap is None else 1 - np.tanh(z / cap) ** 2)
        found.hidden[i] = weight.T @ slope
        found.weight += np.outer(slope, hidden[i])
        found.bias += slope
    return found


def next_words(labels: np.ndarray, ignored: int = -100) -> np.ndarray:
    """(B, T) labels as targets (B * T,): at each place the word after it, at the last none."""
    return np.concatenate([np.append(row[1:], ignored) for row in labels])
