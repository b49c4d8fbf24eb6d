"""Steps of adapters' optimizers in float64 numpy, written from the papers' equations."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) of one array."""

    rate: float
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    steps: int = 0
    moments: list[np.ndarray] = field(default_factory=list)

    def step(self, value: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """The value after one more step."""
        first, second = self.moments or [np.zeros_like(value), np.zeros_like(value)]
        self.steps += 1
        first = self.betas[0] * first + (1 - self.betas[0]) * gradient
        second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
        self.moments = [first, second]
        mean = first / (1 - self.betas[0] ** self.steps)
        variance = second / (1 - self.betas[1] ** self.steps)
        return value - self.rate * self.decay * value - self.rate * mean / (np.sqrt(variance) + self.epsilon)


def nearest_step(A: np.ndarray, gradient: np.ndarray, scaling: float) -> np.ndarray:
    """The D (out, r) for which s D A is nearest to ``gradient`` (out, in), by least squares row by row."""
    return np.linalg.lstsq(scaling * A.T, gradient.T, rcond=None)[0].T
