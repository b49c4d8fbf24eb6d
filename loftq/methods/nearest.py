"""Starts whose quantized weight is rounded to the nearest codes, and whose branch is the best in some metric: the
alternation as it stands."""

from __future__ import annotations

from .alternation import Rounding, alternate
from .metric import Metric
from .registry import LoftQResult, Problem, register_method
from .rounding import round_by_search


def nearest_rounding(problem: Problem, metric: Metric) -> Rounding:
    """Rounding to the nearest codes, to scales searched under ``metric`` if the problem asks for it."""
    if problem.scale_search:
        return lambda matrix: round_by_search(matrix, problem.quantize, metric)
    return problem.quantize


@register_method("loftq")
def loftq(problem: Problem) -> LoftQResult:
    """LoftQ (Li et al. 2023, arXiv 2310.08659), but for the points that ``alternate`` lists."""
    return alternate(problem, Metric(), nearest_rounding(problem, Metric()))


@register_method("qera-diag", statistics="diagonal")
def qera_diag(problem: Problem) -> LoftQResult:
    """QERA-approx (Zhang et al. 2024, arXiv 2410.06040): sBA = svd_r((W - Q) D) D^-1 with D^2 the inputs' mean
    squares, the least of E ||(W - Q - sBA) x||^2 where the inputs are uncorrelated; alternated."""
    metric = problem.metric(diagonal=True)
    return alternate(problem, metric, nearest_rounding(problem, metric))


@register_method("qera", statistics="full")
def qera(problem: Problem) -> LoftQResult:
    """QERA-exact (Zhang et al. 2024, arXiv 2410.06040): sBA = svd_r((W - Q) F) F^-1 with F F^T = E[x x^T], the least
    of E ||(W - Q - sBA) x||^2; alternated."""
    metric = problem.metric()
    return alternate(problem, metric, nearest_rounding(problem, metric))
