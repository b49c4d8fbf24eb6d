"""What a start by error feedback will leave of a layer's output, without rounding its weight.

Rounding is steered by what the adapter leaves of the moments, damped: R_s + mu I = U D U^T (``leaning``, ``rounding``).
Error feedback makes column k of E U the error of rounding one value there to its nearest code. With v_k the mean square
of that, and errors of different columns independent,

    tr(E R_s E^T) ~ out * sum_k v_k (U^-1 R_s U^-T)_kk = out * sum_k v_k (D_kk - mu ||row k of U^-1||^2)

is what is left when the adapter has taken its part. The nearest codes of some rows give v. A choice among many layers
and types needs no more, and rounding them all costs as much as several starts of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.codecs.codebooks import is_rotated
from qlora_kit.codecs.trellis.rotation import rotate

from .factors import made
from .leaning import leaning_metric
from .metric import LEAST_DAMPING, Metric, output_norm
from .registry import Problem, some_rows
from .rounding import round_by_search


@torch.no_grad()
def foretold_error(problem: Problem) -> float | None:
    """sqrt(tr(E R E^T) / tr(W R W^T)) as ``LoftQResult.output_error``, about; None where nothing can be said of it:
    without full moments, and of an adapter that takes half of the weight's directions or more."""
    R = problem.statistics
    if R is None or R.dim() != 2 or 2 * problem.rank > min(problem.weight.shape):
        return None
    weight, metric = problem.weight, leaning_metric(problem)
    size = output_norm(weight, R)
    if not size or metric.order is None:
        return None
    mu = max(problem.damping, LEAST_DAMPING) * float(R.diagonal().mean())
    rotated = is_rotated(problem.quantize.quant_type)
    what = "felt", rotated, problem.rank, problem.damping, problem.solver, problem.seed
    felt = made(problem.factors, (R,), what, lambda: _felt(metric, rotated, mu))
    rows = some_rows(weight)
    lost = rows - _rounded(rows, problem, metric)
    columns = rotate(lost) if rotated else lost[:, metric.order]
    return float((len(weight) * (columns.double().square().mean(0) @ felt)).sqrt()) / size


def _felt(metric: Metric, rotated: bool, mu: float) -> Tensor:
    """float64 (in,) D_kk - mu ||row k of U^-1||^2, in the order that columns are rounded in."""
    factor = metric.rotated_factor if rotated else metric.factor
    assert factor is not None
    factor = factor.double()
    roots = factor.diagonal()
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor / roots, eye, upper=True, unitriangular=True)
    return (roots.square() - mu * inverse.square().sum(1)).clamp_min(0)


def _rounded(rows: Tensor, problem: Problem, metric: Metric) -> Tensor:
    """``rows`` with the scales that error feedback starts from, to the nearest codes."""
    if problem.scale_search is False:
        return problem.quantize(rows).dequantize()
    return round_by_search(rows, problem.quantize, metric).dequantize()
