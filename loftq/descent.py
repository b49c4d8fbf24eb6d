"""Codes for a small delta on a weight that lies on the grid already.

A dequantized weight sits in the middle of its cells. Rounding base + delta to the nearest codes gives the base back
wherever the delta is less than half a step, so a small delta is gone as a whole, and a rounding with error feedback has
nothing to feed back. Yet codes can carry it together: changed ones, few, whose effects on the inputs add up to the
delta's.

Coordinate descent finds them (QuantEase: Behdin et al. 2023, arXiv 2309.01885). With the error E = target - Q and the
inputs' second moments R, column after column of Q is set to the levels nearest to

    q_k + (E R)_k / R_kk

which minimizes tr(E R E^T) over that column, the others as they are. It starts from the stored codes, at the stored
scales, and never raises that error.

What arrives that way is still too little: a code changes only if that pays by itself, so of a small delta most stays
undone, always in the same direction. So the target of each output row is base + c * delta, with the c of that row for
which the share that arrives,

    <Q - base, delta>_R / <delta, delta>_R,

is one. What is left of the error then is noise, and no longer a part of what was learned.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError

from .metric import DAMPING, LEAST_DAMPING

# Columns between which (E R) is brought up to date by one product.
_BLOCK = 64
# How far beyond the delta a row may aim, and how often it aims anew: steps of a bisection on the logarithm.
_FARTHEST, _AIMS = 200.0, 6


@torch.no_grad()
def round_from_codes(stored: Quantized, delta: Tensor, moments: Tensor, *, damping: float = DAMPING) -> Quantized:
    """``stored`` with codes changed, at the same scales, so that it carries ``delta`` besides.

    Args:
        stored: of blocks, not int8's rows.
        delta: float32 (out, in), to be added to what ``stored`` reads as.
        moments: second moments (in, in) of the layer's inputs, or their diagonal (in,).
        damping: share of the mean square that is added to each input's own.
    """
    if stored.blocksize is None:
        raise ConfigError(
            "stored: expected codes of blocks with a table, found int8's rows; round those to the nearest"
        )
    problem = _Descent(stored, delta, _damped(moments, damping))
    rows = len(delta)
    low, high = torch.ones(rows, device=delta.device), torch.full((rows,), _FARTHEST, device=delta.device)
    best = stored.codes.clone()
    nearest = torch.ones(rows, device=delta.device)  # |share - 1| of the codes as they are stored
    aim = low.clone()
    for _ in range(1 + _AIMS):
        codes, share = problem.aimed(aim)
        closer = (share - 1).abs() < nearest
        best[closer], nearest = codes[closer], torch.where(closer, (share - 1).abs(), nearest)
        high, low = torch.where(share >= 1, aim, high), torch.where(share >= 1, low, aim)
        aim = (low * high).sqrt()
    parts = stored.quant_type, best, stored.stored_scales, stored.stored_shifts, stored.blocksize, None, stored.rows
    return Quantized(*parts)


class _Descent:
    """One weight's columns as rows, those of the largest mean square first: what is worked on then lies together."""

    def __init__(self, stored: Quantized, delta: Tensor, moments: Tensor) -> None:
        assert stored.blocksize is not None
        self.order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        self.moments = moments[self.order][:, self.order].contiguous()
        self.levels, labels = stored.table().sort(stable=True)
        self.labels = labels.to(torch.uint8)
        self.midpoints = (self.levels[:-1] + self.levels[1:]) / 2
        block = torch.arange(delta.numel(), device=delta.device).div_(stored.blocksize, rounding_mode="floor")
        block = block.view(delta.shape).T[self.order]
        self.scales = stored.scales[block]
        self.shifts = None if stored.shifts is None else stored.shifts[block]
        self.codes = stored.codes.T[self.order].contiguous()
        self.delta = delta.T[self.order].contiguous()
        self.base = stored.dequantize().T[self.order].contiguous()
        self.weighed = self.moments @ self.delta  # (E R) of E = delta, transposed
        self.size = (self.weighed * self.delta).sum(0)

    def aimed(self, aim: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, in) after one sweep towards base + aim * delta, and by row the share of it that arrives."""
        moments, square = self.moments, self.moments.diagonal()
        error, weighed = self.delta * aim, self.weighed * aim
        divisor = torch.where(self.scales == 0, torch.ones_like(self.scales), self.scales)
        codes, change = torch.empty_like(self.codes), torch.empty_like(error)
        for begin in range(0, len(error), _BLOCK):
            rows = slice(begin, min(begin + _BLOCK, len(error)))
            inner, moved = moments[rows, rows], torch.zeros_like(error[rows])
            for k, column in enumerate(range(rows.start, rows.stop)):
                step = weighed[column] if k == 0 else weighed[column] + inner[k, :k] @ moved[:k]
                goal = self.base[column] + step / square[column]
                value = goal if self.shifts is None else goal - self.shifts[column]
                rank = torch.bucketize(value / divisor[column], self.midpoints)
                read = self.levels[rank] * self.scales[column]
                change[column] = (read if self.shifts is None else read + self.shifts[column]) - self.base[column]
                moved[k] = -change[column]  # what the column's error changes by
                codes[column] = self.labels[rank]
            weighed.addmm_(moments[:, rows], moved)
        placed = torch.empty_like(codes)
        placed[self.order] = codes
        arrived = (change * self.weighed).sum(0)
        return placed.T.contiguous(), torch.where(self.size > 0, arrived / self.size.clamp_min(1e-30), 1.0)


def _damped(moments: Tensor, damping: float) -> Tensor:
    """Moments as a matrix, float32 (in, in), damped as in ``Metric``; the identity for inputs that are all zero."""
    matrix = torch.diag(moments.float()) if moments.dim() == 1 else moments.float().clone()
    mean = matrix.diagonal().mean()
    if mean == 0:
        return torch.eye(len(matrix), device=matrix.device)
    matrix.diagonal().add_(max(damping, LEAST_DAMPING) * mean)
    return matrix
