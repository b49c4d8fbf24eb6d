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
undone, always in the same direction. The least error among codes for which the share of the delta that arrives,

    <Q - base, delta>_R / <delta, delta>_R,

is one has, as its Lagrangian, the plain problem with the target base + c * delta, so c is searched. Then the same for
every direction that the adapter reads and writes rather than for their sum: with delta = B A, what of the lost output
is a linear function of the adapter's own features A x, lost R A^T (A R A^T)^-1, is projected on the columns of B and
added to the target's B, c times, and the codes are chosen anew. The target stays of the adapter's rank. What is left of
the error then is noise, and no longer a part of what was learned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import share_arrived

from .checks import check_moments
from .metric import DAMPING, LEAST_DAMPING
from .rounding import ascending

# Columns between which (E R) is brought up to date by one product.
_BLOCK = 64
# How far beyond the delta to aim, how often to aim anew, the share that is near enough to 1, and how often what is
# lost in the adapter's directions is added.
_FARTHEST, _AIMS, _NEAR = 200.0, 12, 0.05
_CORRECTIONS = 4
# Of the delta; with less the aim is moved farther. And how far inside of what was tried the next aim lies at least.
_HALFWAY, _INSIDE = 0.3, 0.25
# Relative to the largest, what a direction of the adapter's has to have to be one.
_NO_DIRECTION = 1e-5


@torch.no_grad()
def round_from_codes(
    stored: Quantized, A: Tensor, B: Tensor, moments: Tensor, *, damping: float = DAMPING
) -> Quantized:
    """``stored`` with codes changed, at the same scales, so that it carries B A besides.

    Args:
        stored: of blocks, not int8's rows.
        A, B: float32 (rank, in) and (out, rank); their product is to be added to what ``stored`` reads as.
        moments: second moments (in, in) of the layer's inputs, or their diagonal (in,).
        damping: share of the mean square that is added to each input's own.

    Raises:
        ConfigError: codes without a table, or moments that can be none.
    """
    if stored.blocksize is None:
        raise ConfigError(
            "stored: expected codes of blocks with a table, found int8's rows; round those to the nearest"
        )
    check_moments(moments)
    descent = _Descent(stored, A, B, _damped(moments, damping))
    if descent.size == 0:
        return stored
    aim, best = _aim(descent)
    if not 0 < best.share < 2:  # farther from the delta than nothing is
        return stored
    step = aim
    for _ in range(_CORRECTIONS):
        tried = descent.attempt(best.target + step * descent.correction(best.lost))
        # A correction may not unlearn the whole for the parts: changed codes answer to a target in jumps, and the least
        # missing was often found far on one side of the delta.
        if tried.off <= max(best.off, _NEAR) and tried.missing < best.missing:
            best = tried
        else:
            step /= 2
    return replace(stored, codes=best.codes, exact_scales=None)


def _aim(descent: _Descent) -> tuple[float, _Attempt]:
    """How far beyond the delta the target has to lie, and what comes of it: of all that was tried, what brings the
    delta best as a whole.

    What is missing is never compared with the stored codes: of a small delta it is mostly noise, and the codes without
    noise would win by bringing nothing.
    """
    aim = 1.0
    best: tuple[float, _Attempt] | None = None
    below: tuple[float, float] | None = None
    above: tuple[float, float] | None = None
    for _ in range(_AIMS):
        attempt = descent.attempt(aim * descent.B)
        if best is None or attempt.off < best[1].off:
            best = aim, attempt
        if attempt.off < _NEAR or (aim == _FARTHEST and attempt.share < 1):
            break
        below, above = ((aim, attempt.share), above) if attempt.share < 1 else (below, (aim, attempt.share))
        if below is None or above is None:
            aim = min(aim * (0.5 if below is None else 2 if attempt.share > _HALFWAY else 4), _FARTHEST)
        else:  # between the two where a straight line meets 1, but well inside: the share moves in jumps
            way = (1 - below[1]) / (above[1] - below[1])
            aim = below[0] * (above[0] / below[0]) ** min(max(way, _INSIDE), 1 - _INSIDE)
    assert best is not None
    return best


@dataclass(frozen=True)
class _Attempt:
    """Codes (out, in) for the target base + ``target`` (out, rank) @ A, the E R A^T that they leave, the share of the
    delta that they bring, and what they leave of it in the adapter's directions."""

    target: Tensor
    codes: Tensor
    lost: Tensor
    share: float
    missing: float

    @property
    def off(self) -> float:
        return abs(self.share - 1)


class _Descent:
    """One weight's columns as rows, those of the largest mean square first: what is worked on then lies together."""

    def __init__(self, stored: Quantized, A: Tensor, B: Tensor, moments: Tensor) -> None:
        self.order = torch.argsort(moments.diagonal(), descending=True, stable=True)
        self.moments = moments[self.order][:, self.order].contiguous()
        self.levels, self.labels, self.midpoints = ascending(stored)
        self.scales = self._of_each(stored, stored.scales)
        self.shifts = None if stored.shifts is None else self._of_each(stored, stored.shifts)
        self.stored = stored.codes.T[self.order].contiguous()
        self.base = stored.dequantize().T[self.order].contiguous()
        self.B = B
        self.features = A.T[self.order].contiguous()  # (in, rank)
        self.weighed = self.moments @ self.features  # R A^T
        self.gram = self.features.T @ self.weighed  # A R A^T
        self.delta = B @ self.gram  # what is lost with the stored codes
        # Directions below what float32 sums leave would be noise, many times over.
        self.inverse = torch.linalg.pinv(self.gram.double(), rtol=_NO_DIRECTION, hermitian=True).float()
        columns, sizes, _ = torch.linalg.svd(B, full_matrices=False)
        self.written = columns[:, sizes > _NO_DIRECTION * sizes.max()]
        self.size = float((self.delta * B).sum(dtype=torch.float64))

    def _of_each(self, stored: Quantized, parts: Tensor) -> Tensor:
        """A value per block of ``stored`` as one per weight, columns as rows."""
        assert stored.blocksize is not None
        flat = parts.repeat_interleave(stored.blocksize)[: stored.codes.numel()]
        return flat.view(stored.codes.shape).T[self.order].contiguous()

    def aimed(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, in) after one sweep from the stored ones towards base + ``target`` (out, rank) @ A; and E R A^T
        (out, rank) of the error E = base + B A - Q."""
        moments, square = self.moments, self.moments.diagonal()
        weighed = self.weighed @ target.T
        divisor = torch.where(self.scales == 0, torch.ones_like(self.scales), self.scales)
        codes = torch.empty(self.base.shape, dtype=torch.uint8, device=target.device)
        changes = torch.zeros_like(target.T)
        for begin in range(0, len(weighed), _BLOCK):
            rows = slice(begin, min(begin + _BLOCK, len(weighed)))
            inner, moved = moments[rows, rows], torch.zeros_like(weighed[rows])
            for k, column in enumerate(range(rows.start, rows.stop)):
                step = weighed[column] if k == 0 else weighed[column] + inner[k, :k] @ moved[:k]
                goal = self.base[column] + step / square[column]
                value = goal if self.shifts is None else goal - self.shifts[column]
                rank = torch.bucketize(value / divisor[column], self.midpoints)
                read = self.levels[rank] * self.scales[column]
                # What the column's error changes by.
                moved[k] = self.base[column] - (read if self.shifts is None else read + self.shifts[column])
                # Where two codes read alike, as any do at a scale of 0, the stored one stays.
                codes[column] = torch.where(moved[k] == 0, self.stored[column], self.labels[rank])
            weighed.addmm_(moments[:, rows], moved)
            changes.addmm_(self.weighed[rows].T, moved)
        placed = torch.empty_like(codes)
        placed[self.order] = codes
        return placed.T.contiguous(), self.delta + changes.T

    def attempt(self, target: Tensor) -> _Attempt:
        codes, lost = self.aimed(target)
        return _Attempt(target, codes, lost, self.share(lost), self.missing(lost))

    def share(self, lost: Tensor) -> float:
        """Of the delta, how much arrives in the direction of its effect."""
        return share_arrived(lost, self.B, self.gram)

    def correction(self, lost: Tensor) -> Tensor:
        """(out, rank) that, times A, has the same effect as the lost output has in the adapter's directions."""
        return self.written @ (self.written.T @ (lost @ self.inverse))

    def missing(self, lost: Tensor) -> float:
        """The mean square of that effect."""
        part = self.written.T @ lost
        return float(((part @ self.inverse) * part).sum())


def _damped(moments: Tensor, damping: float) -> Tensor:
    """Moments as a matrix, float32 (in, in), in units of their mean square, and damped as in ``Metric``; the identity
    for inputs that are all zero."""
    matrix = torch.diag(moments.float()) if moments.dim() == 1 else moments.float()
    mean = matrix.diagonal().double().mean().float()
    if mean == 0:
        return torch.eye(len(matrix), device=matrix.device)
    matrix = matrix / mean
    matrix.diagonal().add_(max(damping, LEAST_DAMPING))
    return matrix
