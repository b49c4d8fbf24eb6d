"""Starts that keep the weight's own top directions out of what is quantized: QPiSSA, and a share of the rank."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.lowrank import factor_pair, norm, truncated_svd

from .alternation import alternate
from .metric import Metric
from .nearest import nearest_rounding
from .registry import LoftQResult, Problem, register_method

# Shares of the rank that SRR tries to give to the weight's own directions.
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


@register_method("pissa")
def pissa(problem: Problem) -> LoftQResult:
    """QPiSSA (Meng et al. 2024, arXiv 2404.02948): sBA = svd_r(W - Q) with Q = 0 at first, then Q = quantize(W - sBA).

    The branch is the weight's principal part, and the quantizer gets what is left, which it rounds more finely.
    Further steps alternate in that order (the publication's "QPiSSA-T-iters"); the best is returned.
    """
    full, scaling = problem.weight, problem.scaling
    rounding = nearest_rounding(problem, Metric())
    size = norm(full) or 1.0
    zero_error = problem.zero_norms[0] / size
    history: list[float] = []
    rest, U = full, None
    while True:
        U, S, Vh = truncated_svd(rest, problem.rank, solver=problem.solver, start=U, seed=problem.seed)
        A, B = factor_pair(U, S, Vh, scaling)
        goal = torch.addmm(full, B, A, alpha=-scaling)
        quantized = rounding(goal)
        stored = quantized.dequantize()
        history.append(norm(goal - stored) / size)
        rest = full - stored
        if history[-1] == min(history):
            best = LoftQResult(quantized, A, B, history, zero_error, norm(rest) / size)
        if problem.ended(history):
            return best


@register_method("srr", statistics="full")
def srr(problem: Problem) -> LoftQResult:
    """Split the rank between the weight's top directions and the error's (after SRR, 2026, arXiv 2602.02001).

    For k of 0, r/4, r/2, 3r/4 and r: the k directions of W that carry most output, svd_k(W F) F^-1, are kept out of
    what is quantized, and the whole rank r then corrects W - Q_k. The k of the least measured output error is
    taken; k = 0 is QERA, k = r starts as QPiSSA does. Further steps alternate from there.
    """
    metric = problem.metric()
    rounding = nearest_rounding(problem, metric)
    full = problem.weight
    U, S, Vh = truncated_svd(metric.weigh(full), problem.rank, solver=problem.solver, seed=problem.seed)
    once = replace(problem, steps=1)
    results: list[tuple[LoftQResult, Tensor]] = []
    for kept in sorted({round(share * problem.rank) for share in _SHARES}):
        top = metric.unweigh(S[:kept, None] * Vh[:kept])
        goal = torch.addmm(full, U[:, :kept], top, alpha=-1)
        results.append((alternate(once, metric, rounding, goal=goal), goal))
    best, goal = min(results, key=lambda found: found[0].history[-1])
    return best if problem.steps == 1 else alternate(problem, metric, rounding, goal=goal)
