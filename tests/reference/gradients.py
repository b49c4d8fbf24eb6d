"""What the loss makes of an error in a module's output, by the definition: float64, no hooks, no recomputation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def divergence(before: Tensor, after: Tensor) -> float:
    """The mean over rows of KL(p || q) of logits (rows, classes), in nats."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def nats_of_noise(logits_with: Callable[[Tensor], Tensor], shape: tuple[int, ...], size: float, draws: int) -> float:
    """The mean divergence that an error of mean square ``size ** 2`` in all, equal in every direction, makes of an
    output
    (tokens, features); per unit of E||d||^2.

    Args:
        logits_with: the logits with that error added to the output.
    """
    draw = torch.Generator().manual_seed(0)
    still, total = logits_with(torch.zeros(shape, dtype=torch.float64)), 0.0
    each = size / math.sqrt(shape[-1])
    for _ in range(draws):
        noise = torch.randn(shape, generator=draw, dtype=torch.float64) * each
        total += divergence(still, logits_with(noise))
    return total / draws / size**2
