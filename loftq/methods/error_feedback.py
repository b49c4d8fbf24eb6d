"""Starts whose quantized weight is itself fitted to the inputs: rounded with error feedback to searched scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from qlora_kit.lowrank import norm

from .alignment import aligned_weight, trusted_weight
from .alternation import Rounding, alternate
from .foretold import foretold_error
from .leaning import leaning_metric
from .metric import Metric
from .registry import LoftQResult, Problem, register_method
from .rounding import round_with_feedback


@register_method("cloq", statistics="full", foretell=foretold_error)
def cloq(problem: Problem) -> LoftQResult:
    """CLoQ (Deng et al. 2025, arXiv 2501.18475): Q by error feedback against R, then sBA = svd_r((W - Q) F) F^-1.

    With R damped by 0.01 of its mean square, as published. Instead of MagR's preprocessing, the blocks' scales are
    searched; and the two half-steps may alternate, Q then being rounded from W - sBA. It leans on the adapter (see
    ``leaning``) where that is asked for.
    """
    return _fed_back(problem, problem.metric(), lean=problem.adapter_aware is True)


@register_method("aligned", statistics="full", sequential=True, foretell=foretold_error)
def aligned(problem: Problem) -> LoftQResult:
    """Later layers make up for earlier ones: the inputs are those of the quantized model, layer after layer.

    The weight that the original model's outputs ask for, V of ``alignment``, takes the weight's place in "cloq", under
    the quantized model's inputs x^; for E ||W x - V' x^||^2 exceeds its least by tr((V - V') R (V - V')^T), V being
    where it is least. Where the layer's output is added to a stream h, as attention's and a feed-forward's last layers'
    are, V also makes up for what is missing there: h + W x is aimed at, and h^ is there already. And the rounding leans
    on the adapter. (Aligning first and correcting then is the idea of Align-then-Correct, 2026; the objective is the
    sequential one of GPTAQ, Li et al. 2025, arXiv 2504.02692, in closed form.)

    Without moments of a half, V is (W (C + mu I) + S)(R^ + mu I)^-1 with the metric's own damping for mu.
    """
    metric = problem.metric()
    lean = problem.adapter_aware is not False
    if problem.cross is None or problem.statistics is None or metric.order is None:
        return _fed_back(problem, metric, lean=lean)
    target = _target(problem, problem.statistics, problem.cross)
    full = problem.weight
    size = norm(full) or 1.0
    zero_error = problem.zero_norms[0] / size
    result = _fed_back(replace(problem, weight=target), metric, lean=lean, zero_error=zero_error)
    left = full - result.quantized.dequantize()
    quantization_error = norm(left) / size
    return replace(
        result,
        zero_error=zero_error,
        quantization_error=quantization_error,
        goal=target,
        error=norm(left.addmm_(result.B, result.A, alpha=-problem.scaling)) / size,
    )


def _target(problem: Problem, statistics: Tensor, cross: Tensor) -> Tensor:
    """V, float32 (out, in)."""
    also: dict[str, Any] = {"shortfall": problem.shortfall, "factors": problem.factors}
    if problem.half is None:
        return aligned_weight(problem.weight, statistics, cross, problem.damping, **also)
    return trusted_weight(problem.weight, statistics, cross, problem.half, **also)[0]


def _fed_back(problem: Problem, metric: Metric, *, lean: bool, zero_error: float | None = None) -> LoftQResult:
    """The start by error feedback under ``metric``; if ``lean``, rounded under what the adapter leaves of that."""
    steering = leaning_metric(problem) if lean and metric.order is not None else metric
    return alternate(problem, metric, feedback_rounding(problem, steering), zero_error=zero_error)


def feedback_rounding(problem: Problem, metric: Metric) -> Rounding:
    """Error feedback, to searched scales unless the problem says otherwise."""
    search = problem.scale_search is not False
    return lambda matrix: round_with_feedback(matrix, problem.quantize, metric, search=search)
