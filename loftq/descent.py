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

is one. That done, the target is moved a few times by what is still missing along the delta's own singular directions
under R: there are no more than its rank, so what is missing along them is no noise. What is left of the error then is,
and no longer a part of what was learned.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError

from .metric import DAMPING, LEAST_DAMPING

# Columns between which (E R) is brought up to date by one product.
_BLOCK = 64
# How far beyond the delta a row may aim, and how often it aims anew: steps of a bisection on the logarithm.
_FARTHEST, _AIMS = 200.0, 6
# Then how often, and by what part of it, the target is moved by what is missing along the delta's directions.
_CORRECTIONS, _STEP = 3, 0.5


@torch.no_grad()
def round_from_codes(
    stored: Quantized, A: Tensor, B: Tensor, moments: Tensor, *, damping: float = DAMPING
) -> Quantized:
    """``stored`` with codes changed, at the same scales, so that it carries the delta B @ A besides.

    Args:
        stored: of blocks, not int8's rows.
        A, B: float32 (rank, in) and (out, rank); B @ A is to be added to what ``stored`` reads as.
        moments: second moments (in, in) of the layer's inputs, or their diagonal (in,).
        damping: share of the mean square that is added to each input's own.

    Raises:
        ConfigError: codes without a table.
    """
    if stored.blocksize is None:
        raise ConfigError("stored: expected codes of blocks with a table, found int8's rows; round to the nearest")
    descent = _Descent(stored, _damped(moments, damping))
    delta = B @ A
    codes, aim = _by_rows(descent, delta)
    codes = _by_directions(descent, A, B, delta, codes, aim)
    parts = stored.quant_type, codes, stored.stored_scales, stored.stored_shifts, stored.blocksize, None, stored.rows
    return Quantized(*parts)


def _by_rows(descent: _Descent, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in), and the c of each row (out,), with which about all of its delta arrives."""
    weighed = delta @ descent.moments
    size = (weighed * delta).sum(1)
    low = torch.ones_like(size)
    high, aim, best = torch.full_like(size, _FARTHEST), low.clone(), low.clone()
    codes = descent.stored.codes.clone()
    missing = torch.ones_like(size)  # |share - 1| of the codes as they are stored
    for _ in range(1 + _AIMS):
        found, change = descent.towards(aim[:, None] * delta)
        arrived = (change * weighed).sum(1)
        share = torch.where(size > 0, arrived / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(size))
        closer = ((share - 1).abs() < missing) & (size > 0)
        codes[closer], best[closer] = found[closer], aim[closer]
        missing = torch.where(closer, (share - 1).abs(), missing)
        high, low = torch.where(share >= 1, aim, high), torch.where(share >= 1, low, aim)
        aim = (low * high).sqrt()
    return codes, best


def _by_directions(descent: _Descent, A: Tensor, B: Tensor, delta: Tensor, codes: Tensor, aim: Tensor) -> Tensor:
    """``codes``, or better ones, towards a target moved by what is missing along the delta's singular directions."""
    factor = torch.linalg.cholesky(descent.moments.double()).float()  # R = F F^T
    left, core = torch.linalg.qr(B)
    right, other = torch.linalg.qr((A @ factor).T)
    kept = torch.linalg.svdvals(core @ other.T) > 1e-6 * torch.linalg.matrix_norm(core @ other.T, 2)
    U, _, Vh = torch.linalg.svd(core @ other.T)
    U, V = left @ U[:, : int(kept.sum())], right @ Vh[: int(kept.sum())].T
    back = torch.linalg.solve_triangular(factor, V.T, upper=False, left=False)  # V^T F^-1
    onto = factor @ V
    target, change = aim[:, None] * delta, descent.read(codes) - descent.base
    missing = U.T @ ((delta - change) @ onto)
    for _ in range(_CORRECTIONS):
        target = target + _STEP * aim[:, None] * (U @ missing @ back)
        found, change = descent.towards(target)
        left_over = U.T @ ((delta - change) @ onto)
        if left_over.norm() >= missing.norm():
            break
        codes, missing = found, left_over
    return codes


class _Descent:
    """Sweeps over one weight's columns, from its stored codes. Inside, columns are rows, those of the largest mean
    square first: what is worked on at a time then lies together."""

    def __init__(self, stored: Quantized, moments: Tensor) -> None:
        assert stored.blocksize is not None
        self.stored, self.moments = stored, moments
        self.base = stored.dequantize()
        self._order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        self._moments = moments[self._order][:, self._order].contiguous()
        self._levels, labels = stored.table().sort(stable=True)
        self._labels = labels.to(torch.uint8)
        self._midpoints = (self._levels[:-1] + self._levels[1:]) / 2
        block = torch.arange(self.base.numel(), device=moments.device).div_(stored.blocksize, rounding_mode="floor")
        block = block.view(self.base.shape).T[self._order]
        self._scales = stored.scales[block]
        self._shifts = None if stored.shifts is None else stored.shifts[block]
        self._sorted = self.base.T[self._order].contiguous()

    def read(self, codes: Tensor) -> Tensor:
        """float32 (out, in) of ``codes`` at the stored scales."""
        return replace(self.stored, codes=codes, source=None).dequantize()

    def towards(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, in) after one sweep towards base + ``delta``, and what they change of the base."""
        square, blocked = self._moments.diagonal(), self._moments
        weighed = blocked @ delta.T[self._order]  # (E R), of the error E = delta at first
        divisor = torch.where(self._scales == 0, torch.ones_like(self._scales), self._scales)
        codes = torch.empty(weighed.shape, dtype=torch.uint8, device=weighed.device)
        change = torch.empty_like(weighed)
        for begin in range(0, len(weighed), _BLOCK):
            rows = slice(begin, min(begin + _BLOCK, len(weighed)))
            inner, moved = blocked[rows, rows], torch.empty_like(weighed[rows])
            for k, column in enumerate(range(rows.start, rows.stop)):
                pull = weighed[column] if k == 0 else weighed[column] - inner[k, :k] @ moved[:k]
                goal = self._sorted[column] + pull / square[column]
                value = goal if self._shifts is None else goal - self._shifts[column]
                rank = torch.bucketize(value / divisor[column], self._midpoints)
                read = self._levels[rank] * self._scales[column]
                moved[k] = (read if self._shifts is None else read + self._shifts[column]) - self._sorted[column]
                codes[column] = self._labels[rank]
            change[rows] = moved
            weighed.addmm_(blocked[:, rows], moved, alpha=-1)
        back = torch.empty_like(self._order)
        back[self._order] = torch.arange(len(back), device=back.device)
        return codes[back].T.contiguous(), change[back].T.contiguous()


def _damped(moments: Tensor, damping: float) -> Tensor:
    """Moments as a matrix, float32 (in, in), damped as in ``Metric``; the identity for inputs that are all zero."""
    matrix = torch.diag(moments.float()) if moments.dim() == 1 else moments.float().clone()
    mean = matrix.diagonal().mean()
    if mean == 0:
        return torch.eye(len(matrix), device=matrix.device)
    matrix.diagonal().add_(max(damping, LEAST_DAMPING) * mean)
    return matrix
