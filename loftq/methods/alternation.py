"""The alternation that all starts share: a quantized weight and a low-rank branch that together come closest to
the full weight W (out, in), as LoftQ does it (Li et al. 2023, arXiv 2310.08659, Algorithm 1).

    B = A = 0
    repeat:  Q = quantize(W - s B A);   s B A = the best rank-r approximation of W - Q

in the plain norm or in one weighted by the layer's inputs (``metric``). With F F^T = R the best correction of W - Q
for inputs of second moments R is svd_r((W - Q) F) F^-1 (QERA: Zhang et al. 2024, arXiv 2410.06040, which takes the
symmetric root for F; any F gives the same product).

Points where implementations differ decide whether it helps and what it costs:

- The branch is multiplied by the adapter's scaling s when it runs, so s B A is what has to be the correction.
- Quantization comes first. The first iterate is then the plain quantized weight with its residual's best
  correction, and can't be worse than the zero start of the same weight.
- Neither half-step knows the other, so the error may rise. The best iterate is returned, and the loop ends at
  the first step that is no better than the one before it.
- The residual changes little from one step to the next, so each decomposition starts from the subspace of the
  one before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qlora_kit.codecs.quantized import Quantized
from qlora_kit.lowrank import factor_pair, norm, truncated_svd

from .metric import Metric
from .quantizers import quantizer_for
from .registry import LoftQResult, Problem

Rounding = Callable[[Tensor], Quantized]


def alternate(
    problem: Problem,
    metric: Metric,
    rounding: Rounding,
    *,
    goal: Tensor | None = None,
    zero_error: float | None = None,
) -> LoftQResult:
    """The best of up to ``problem.steps`` alternations under ``metric``.

    Args:
        rounding: from float32 (out, in) to its quantized form.
        goal: what the first step quantizes; None is the weight.
        zero_error: that of the result, where it is known.
    """
    full = problem.weight
    size = norm(metric.weigh(full)) or 1.0
    plain_size = size if metric.plain else norm(full) or 1.0
    plainly, U = goal is None and rounding is problem.quantize, None
    goal = full if goal is None else goal
    history: list[float] = []
    left = torch.empty_like(full)  # one piece of memory for what each half-step leaves
    zero = zero_error
    while True:
        quantized = rounding(goal)
        torch.sub(full, quantized.dequantize(out=left), out=left)
        quantization_error = norm(left) / plain_size
        if zero is None:
            zero = quantization_error if plainly else problem.zero_norms[0] / plain_size
        A, B, U = fitted(left, problem, metric, U)
        goal = torch.addmm(full, B, A, alpha=-problem.scaling)
        left.add_(goal).sub_(full)
        history.append(norm(metric.weigh(left)) / size)
        if history[-1] == min(history):
            error = history[-1] if metric.plain else norm(left) / plain_size
            best = LoftQResult(quantized, A, B, history, zero, quantization_error, error=error)
        if problem.ended(history):
            return best


def fitted(
    residual: Tensor, problem: Problem, metric: Metric, start: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scaling * B @ A`` the closest to ``residual`` (out, in) under ``metric``,
    and the left singular vectors (out, rank), to start a similar one from."""
    U, S, Vh = truncated_svd(
        metric.weigh(residual), problem.rank, solver=problem.solver, start=start, seed=problem.seed
    )
    A, B = factor_pair(U, S, Vh, problem.scaling)
    if metric.plain:
        return A, B, U
    A = metric.unweigh(A)
    # The way back changes the rows' lengths; both sides are to have the same, or one would learn faster.
    lengths = (torch.linalg.vector_norm(side, dim=dim, dtype=torch.float64) for side, dim in ((B, 0), (A, 1)))
    balance = torch.div(*lengths).sqrt().to(A.dtype)
    balance = torch.where(balance.isfinite() & (balance > 0), balance, torch.ones_like(balance))
    return A * balance[:, None], B / balance, U


def correction(
    residual: Tensor,
    rank: int,
    scaling: float,
    *,
    metric: Metric | None = None,
    solver: str = "auto",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scaling * B @ A`` the closest to ``residual`` (out, in) of that rank."""
    problem = Problem(residual, rank, scaling, quantizer_for(), 1, None, solver, seed)
    A, B, _ = fitted(residual, problem, metric or Metric())
    return A, B
