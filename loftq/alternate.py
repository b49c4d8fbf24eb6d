"""LoftQ's alternation (Li et al. 2023, arXiv 2310.08659, Algorithm 1): a quantized weight and a low-rank branch
that together come closest to the full weight W (out, in).

    B = A = 0
    repeat:  Q = quantize(W - s B A);   s B A = the best rank-r approximation of W - Q

Points where implementations differ decide whether it helps and what it costs:

- The branch is multiplied by the adapter's scaling s when it runs, so s B A is what has to be the correction.
- Quantization comes first. The first iterate is then the plain quantized weight with its residual's best
  correction, and can't be worse than the zero start of the same weight.
- Neither half-step knows the other, so the error may rise. The best iterate is returned, and the loop ends at
  the first step that is no better than the best before it.
- The residual changes little from one step to the next, so each decomposition starts from the subspace of the
  one before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import check_matrix, delta, factor_pair, truncated_svd

from .methods import LoftQResult, Problem, checked_statistics, method_for, norm, output_norm, register_method
from .quantizers import quantizer_for


@torch.no_grad()
def factorize(
    weight: Tensor,
    rank: int,
    *,
    bits: int = 4,
    quant_type: str | None = None,
    steps: int = 5,
    scaling: float = 1.0,
    statistics: Tensor | None = None,
    blocksize: int | str | None = 64,
    double_quant: bool = False,
    method: str = "loftq",
    solver: str = "auto",
    seed: int = 0,
) -> LoftQResult:
    """Quantize ``weight`` and find the branch of rank ``rank`` that makes up for it.

    Args:
        weight: (out, in), finite, any floating dtype and device; the arithmetic is float32.
        rank: between 1 and min(out, in).
        bits, quant_type, blocksize, double_quant: the quantizer, see ``quantizers.quantizer_for``.
        steps: the most alternations to run.
        scaling: the adapter's multiplier s, alpha / rank or alpha / sqrt(rank).
        statistics: second moments E[x x^T] of the layer's inputs, (in, in), or their diagonal (in,). Every
            method reports the output error by them; "loftq" doesn't otherwise look at them.
        method: a registered way to the start: "loftq".
        solver: of the decomposition, see ``qlora_kit.lowrank.truncated_svd``.
        seed: makes runs of solvers that draw random numbers repeatable; the exact ones draw none.

    Raises:
        ConfigError: an argument can't work; names it.
    """
    check_matrix(weight, rank, "weight")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps: expected an integer of at least 1, found {steps!r}; 5 is a good choice")
    solve = method_for(method)
    problem = Problem(
        weight.detach().float(),
        rank,
        scaling,
        quantizer_for(bits=bits, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant),
        steps,
        checked_statistics(statistics, weight),
        solver,
        seed,
    )
    result = solve(problem)
    if problem.statistics is None:
        return result
    full, stored = problem.weight, result.quantized.dequantize()
    size = output_norm(full, problem.statistics) or 1.0
    left = full - stored - delta(result.A, result.B, scaling)
    zero = full - problem.quantize(full).dequantize()
    return replace(
        result,
        output_error=output_norm(left, problem.statistics) / size,
        zero_output_error=output_norm(zero, problem.statistics) / size,
    )


@register_method("loftq")
def loftq(problem: Problem) -> LoftQResult:
    """As published, but for the points above."""
    full, quantize = problem.weight, problem.quantize
    size = norm(full) or 1.0
    goal, U = full, None
    history: list[float] = []
    left = torch.empty_like(full)  # one piece of memory for what each half-step leaves
    while True:
        quantized = quantize(goal)
        torch.sub(full, quantized.dequantize(out=left), out=left)
        quantization_error = norm(left) / size
        if not history:
            zero_error = quantization_error
        U, S, Vh = truncated_svd(left, problem.rank, solver=problem.solver, start=U, seed=problem.seed)
        A, B = factor_pair(U, S, Vh, problem.scaling)
        goal = torch.addmm(full, B, A, alpha=-problem.scaling)
        history.append(norm(left.add_(goal).sub_(full)) / size)
        if history[-1] == min(history):
            best = LoftQResult(quantized, A, B, history, zero_error, quantization_error)
        if len(history) == problem.steps or (len(history) > 1 and history[-1] >= history[-2]):
            return best


def correction(
    residual: Tensor, rank: int, scaling: float, *, solver: str = "auto", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scaling * B @ A`` the closest to ``residual`` (out, in) of that rank."""
    return factor_pair(*truncated_svd(residual, rank, solver=solver, seed=seed), scaling)
