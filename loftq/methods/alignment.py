"""The weight that makes up for what earlier layers did, as far as a text is to be believed on that.

Let x be a layer's input in the original model and x^ that in the model whose earlier layers are quantized and
corrected, C = E[x x^^T] and R = E[x^ x^^T]. E ||W x - V x^||^2 is least over the text for V = W C R^-1, which on few
rows follows their chance more than the layers' errors: other text then gets worse where the text itself gets better.
So the change of the weight is pulled towards none, and taken in part,

    V = W + alpha D(mu),    D(mu) = M (R + mu I)^-1,    M = W (C - R)

and both numbers are chosen by how much they help on inputs that D wasn't found from. The batches are parted in two
halves. With D_k of one half, the other's error is, up to what depends on neither number,

    E_o ||W x - (W + alpha D_k) x^||^2 = const - 2 alpha <D_k, M_o> + alpha^2 tr(D_k R_o D_k^T)

so that alpha has a closed form for each mu, and the grid of mu costs little: with R_k = Q diag(w) Q^T all of

    <D_k, M_o>        = sum_j s_j / (w_j + mu)                   s_j  = <M_k Q_j, M_o Q_j>
    tr(D_k R_o D_k^T) = sum_jl H_jl / ((w_j + mu)(w_l + mu))     H_jl = <M_k Q_j, M_k Q_l> (Q^T R_o Q)_jl

is made once. What is of the inputs alone serves all weights that are given them. Then D is found anew from all inputs.
The chance in means of twice as many is half as large: half the pull does there, and of the two summands of tr(D_k R_o
D_k^T), which are what both halves say, <D_k, M_o>, and a half's own chance, the second is halved. So

    alpha = <,> / tr    becomes    <,> / (<,> + (tr - <,>) / 2) = 2 alpha / (1 + alpha)

(On SmolLM2's layers at 2 bits this keeps 95 % of what the best mu with alpha = 1 would gain on other text, where the
halves' own alpha kept 87 %.)

Where the layer's output is added to a stream, h in the original model and h^ by now, it is E ||h + W x - h^ - V x^||^2
that is to be least, with the same terms and

    M = W (C - R) + S,    S = E[(h - h^) x^^T]

the layer then also makes up for what is missing in the stream, as far as its inputs tell that. Errors that nobody takes
back add up from block to block, and every later layer reads them. (LoaQ, Lin et al. 2025, arXiv 2509.06297, has layers
follow the stream too, without asking how far the text is to be believed.)

(That the mismatch is to count in part, by a closed form: CoreQ, Cha et al. 2026, arXiv 2602.05902. There the part comes
from a decomposition of the mismatch on the very text that it was found from; here from other rows of it.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qlora_kit.lowrank import norm

from .factors import Factors, made
from .halves import Half
from .metric import DAMPING, LEAST_DAMPING, output_norm

# Tried as mu, in units of the inputs' mean square.
PULLS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Trust:
    """What came out best on inputs that it wasn't found from.

    Attributes:
        pull: mu for a half, in units of the mean square.
        part: alpha of a half, between 0 and 1; 0 where the change only harms.
        gain: by how much it lowers the mean of ||W x - V x^||^2, relative to tr(W R W^T).
    """

    pull: float
    part: float
    gain: float


def aligned_weight(
    weight: Tensor,
    statistics: Tensor,
    cross: Tensor,
    damping: float,
    *,
    shortfall: Tensor | None = None,
    factors: Factors | None = None,
) -> Tensor:
    """(W (C + mu I) + S)(R + mu I)^-1, float32 (out, in), with mu ``damping`` times the mean of R's diagonal.

    Which is W + D(mu), all of it.

    Args:
        factors: where the decomposition of R + mu I is kept for other weights.
    """
    decompose = partial(_decomposed, statistics, damping)
    mu, lu, pivots = made(factors, (statistics,), ("lu", damping), decompose)
    goal = cross.double()
    goal.diagonal().add_(mu)
    goal = weight.double() @ goal
    if shortfall is not None:
        goal += shortfall
    return torch.linalg.lu_solve(lu, pivots, goal, left=False).float()


def trusted_weight(
    weight: Tensor,
    statistics: Tensor,
    cross: Tensor,
    half: Half,
    *,
    shortfall: Tensor | None = None,
    factors: Factors | None = None,
) -> tuple[Tensor, Trust]:
    """W + 2 alpha / (1 + alpha) D(mu / 2), float32 (out, in), of all inputs, by what the halves say of each other."""
    trust = trusted(weight, statistics, cross, half, shortfall=shortfall, factors=factors)
    if not trust.part:
        return weight, trust
    whole = aligned_weight(weight, statistics, cross, trust.pull / 2, shortfall=shortfall, factors=factors)
    return torch.lerp(weight, whole, 2 * trust.part / (1 + trust.part)), trust


def trusted(
    weight: Tensor,
    statistics: Tensor,
    cross: Tensor,
    half: Half,
    *,
    shortfall: Tensor | None = None,
    factors: Factors | None = None,
) -> Trust:
    """The mu of ``PULLS`` and the alpha between 0 and 1 of least error on the halves that D isn't found from, each
    input counting alike.

    Args:
        shortfall: float32 (out, in) S, which ``half`` then has as well.
    """
    size = norm(weight)
    if not size or not statistics.any():
        return Trust(PULLS[0], 0.0, 0.0)
    sides = _sides(statistics, cross, half, factors)
    unit = weight / size
    scale = (output_norm(unit, statistics) / float(statistics.diagonal().mean()) ** 0.5) ** 2
    short = _short(shortfall, half, statistics, size)
    if short is None and len(unit) > unit.shape[1]:
        unit = torch.linalg.qr(unit, mode="r").R  # all that counts of it, in fewer rows
    pulls = torch.tensor(PULLS, dtype=torch.float64, device=weight.device)
    agreement, cost = torch.zeros_like(pulls), torch.zeros_like(pulls)
    for k, side in enumerate(sides):
        own, others = unit @ side.own, unit @ side.others
        if short is not None:
            own.addmm_(short[k], side.basis)
            others.addmm_(short[1 - k], side.basis)
        sums = (own * others).sum(0, dtype=torch.float64)
        products = (own.T @ own).mul_(side.curvature).double()
        inverse = 1 / (side.values[:, None] + pulls)
        agreement += side.counts * (sums @ inverse)
        cost += side.counts * (inverse * (products @ inverse)).sum(0)
    part = torch.where(cost > 0, agreement / cost, torch.zeros_like(cost)).clamp(0, 1)
    gain = 2 * part * agreement - part.square() * cost
    best = int(gain.argmax())
    return Trust(PULLS[best], float(part[best]), float(gain[best]) / scale if scale > 0 else 0.0)


def trusted_damping(statistics: Tensor, cross: Tensor, half: Half, *, factors: Factors | None = None) -> float:
    """The mu of ``PULLS`` with which one half's R + mu I says best what the other half is like, relative to the mean
    square.

    Least is tr((R_k + mu I)^-1 R_o) + log det(R_k + mu I): the other's inputs are likeliest then, as Gaussian ones.
    That is what damping is for: error feedback foretells each input from the later ones, and the likelihood is that of
    these foretellings, one input after the other. The eigenvalues are there already, so it costs next to nothing.
    """
    if not statistics.any():
        return PULLS[0]
    pulls = torch.tensor(PULLS, dtype=torch.float64, device=statistics.device)
    cost = torch.zeros_like(pulls)
    for side in _sides(statistics, cross, half, factors):
        damped = side.values[:, None] + pulls
        cost += side.counts * (side.curvature.diagonal().double()[:, None] / damped + damped.log()).sum(0)
    return PULLS[int(cost.argmin())]


def damping_for(
    asked: float | None, statistics: Tensor | None, cross: Tensor | None, half: Half | None, factors: Factors | None
) -> float:
    """The damping that is ``asked`` for, or what the half says, or without one ``DAMPING``."""
    if asked is not None:
        return asked
    if half is None or statistics is None or cross is None:
        return DAMPING
    return trusted_damping(statistics, cross, half, factors=factors)


@dataclass(frozen=True)
class _Side:
    """A half from which D is found, in units of the mean square, and the other, in the basis of the first's R.

    Attributes:
        values: float64 (in,) R's eigenvalues.
        basis: float32 (in, in) Q, R's eigenvectors.
        own, others: float32 (in, in) (C - R) Q of this half and of the other.
        curvature: float32 (in, in) Q^T R Q of the other.
        counts: the other's share of all inputs.
    """

    values: Tensor
    basis: Tensor
    own: Tensor
    others: Tensor
    curvature: Tensor
    counts: float


def _sides(statistics: Tensor, cross: Tensor, half: Half, factors: Factors | None) -> list[_Side]:
    """Each half in turn as the one from which D is found; made once for all weights that share ``factors``."""
    moments = statistics, cross, half.statistics, half.cross
    return made(factors, moments, ("halves", half.share), lambda: _compared(*moments, half.share))


def _compared(statistics: Tensor, cross: Tensor, half: Tensor, half_cross: Tensor, share: float) -> list[_Side]:
    unit = statistics.double().diagonal().mean()
    first, second = _both(statistics, half, share, unit)
    first_cross, second_cross = _both(cross, half_cross, share, unit)
    mismatches = (first_cross - first).float(), (second_cross - second).float()
    sides = []
    for k, (R, other) in enumerate(((first, second), (second, first))):
        values, Q = torch.linalg.eigh((R + R.T) / 2)
        Q = Q.float()
        own, others = (mismatch @ Q for mismatch in (mismatches[k], mismatches[1 - k]))
        curvature = Q.T @ other.float() @ Q
        sides.append(_Side(values.clamp_min(0), Q, own, others, curvature, 1 - share if k == 0 else share))
    return sides


def _both(whole: Tensor, half: Tensor, share: float, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of the half and of the rest, float64, in that unit."""
    first = half.double() / unit
    return first, (whole.double() / unit - share * first) / (1 - share)


def _short(shortfall: Tensor | None, half: Half, statistics: Tensor, size: float) -> tuple[Tensor, Tensor] | None:
    """S of the half and of the rest, for a weight of that size; None if there is none."""
    if shortfall is None or half.shortfall is None:
        return None
    unit = statistics.double().diagonal().mean() * size
    first, second = _both(shortfall, half.shortfall, half.share, unit)
    return first.float(), second.float()


def _decomposed(statistics: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """mu, and the LU decomposition of R + mu I in float64."""
    moments = statistics.double()
    mu = max(damping, LEAST_DAMPING) * moments.diagonal().mean()
    moments = moments.clone() if moments is statistics else moments
    moments.diagonal().add_(mu)
    lu, pivots = torch.linalg.lu_factor(moments)
    return mu, lu, pivots
