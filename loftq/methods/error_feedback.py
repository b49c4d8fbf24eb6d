"""Starts whose quantized weight is itself fitted to the inputs: rounded with error feedback to searched scales."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from qlora_kit.lowrank import norm

from .alternation import Rounding, alternate
from .factors import Factors, made
from .metric import LEAST_DAMPING, Metric
from .registry import LoftQResult, Problem, register_method
from .rounding import round_with_feedback


@register_method("cloq", statistics="full")
def cloq(problem: Problem) -> LoftQResult:
    """CLoQ (Deng et al. 2025, arXiv 2501.18475): Q by error feedback against R, then sBA = svd_r((W - Q) F) F^-1.

    With R damped by 0.01 of its mean square, as published. Instead of MagR's preprocessing, the blocks' scales are
    searched; and the two half-steps may alternate, Q then being rounded from W - sBA.
    """
    metric = problem.metric()
    return alternate(problem, metric, feedback_rounding(problem, metric))


@register_method("aligned", statistics="full", sequential=True)
def aligned(problem: Problem) -> LoftQResult:
    """Later layers make up for earlier ones: the inputs are those of the quantized model, layer after layer.

    Let x be a layer's input in the original model and x^ that in the model whose earlier layers are quantized and
    corrected. E ||W x - V x^||^2 is least, with damping mu pulling towards W, for

        V = W (C + mu I)(R^ + mu I)^-1,     C = E[x x^^T],  R^ = E[x^ x^^T]

    and exceeds that least by tr((V - Q - sBA)(R^ + mu I)(V - Q - sBA)^T). So V takes the weight's place in "cloq",
    under R^. (Aligning first and correcting then is the idea of Align-then-Correct, 2026; the objective is the
    sequential one of GPTAQ, Li et al. 2025, arXiv 2504.02692, in closed form.)
    """
    metric = problem.metric()
    if problem.cross is None or problem.statistics is None or metric.order is None:
        return cloq(problem)
    target = aligned_weight(problem.weight, problem.statistics, problem.cross, problem.damping, factors=problem.factors)
    full = problem.weight
    size = norm(full) or 1.0
    zero_error = problem.zero_norms[0] / size
    aims = replace(problem, weight=target)
    result = alternate(aims, metric, feedback_rounding(problem, metric), zero_error=zero_error)
    left = full - result.quantized.dequantize()
    quantization_error = norm(left) / size
    return replace(
        result,
        zero_error=zero_error,
        quantization_error=quantization_error,
        goal=target,
        error=norm(left.addmm_(result.B, result.A, alpha=-problem.scaling)) / size,
    )


def aligned_weight(
    weight: Tensor, statistics: Tensor, cross: Tensor, damping: float, *, factors: Factors | None = None
) -> Tensor:
    """W (C + mu I)(R^ + mu I)^-1, float32 (out, in), with mu ``damping`` times the mean of R^'s diagonal.

    Args:
        factors: where the decomposition of R^ + mu I is kept for other weights.
    """
    decompose = partial(_decomposed, statistics, damping)
    mu, lu, pivots = made(factors, (statistics,), ("lu", damping), decompose)
    goal = cross.double()
    goal.diagonal().add_(mu)
    return torch.linalg.lu_solve(lu, pivots, weight.double() @ goal, left=False).float()


def _decomposed(statistics: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """mu, and the LU decomposition of R^ + mu I in float64."""
    moments = statistics.double()
    mu = max(damping, LEAST_DAMPING) * moments.diagonal().mean()
    moments = moments.clone() if moments is statistics else moments
    moments.diagonal().add_(mu)
    lu, pivots = torch.linalg.lu_factor(moments)
    return mu, lu, pivots


def feedback_rounding(problem: Problem, metric: Metric) -> Rounding:
    """Error feedback, to searched scales unless the problem says otherwise."""
    search = problem.scale_search is not False
    return lambda matrix: round_with_feedback(matrix, problem.quantize, metric, search=search)
