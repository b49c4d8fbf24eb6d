"""One weight, quantized and corrected by a method's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.config.checks import check_positive
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import check_matrix, delta

from .alignment import damping_for
from .checks import checked_cross, checked_shortfall, checked_statistics
from .factors import Factors, made
from .halves import Half, checked_half
from .metric import output_norm
from .quantizers import quantizer_for
from .registry import LoftQResult, Problem, method_for, needs_of


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
    cross: Tensor | None = None,
    damping: float | None = None,
    scale_search: bool | None = None,
    factors: Factors | None = None,
    half: Half | None = None,
    adapter_aware: bool | None = None,
    shortfall: Tensor | None = None,
) -> LoftQResult:
    """Quantize ``weight`` and find the branch of rank ``rank`` that makes up for it.

    Args:
        weight: (out, in), finite, any floating dtype, layout and device; the arithmetic is float32.
        rank: between 1 and min(out, in).
        bits, quant_type, blocksize, double_quant: the quantizer, see ``quantizers.quantizer_for``.
        steps: the most alternations to run.
        scaling: the adapter's multiplier s, alpha / rank or alpha / sqrt(rank).
        statistics: second moments E[x x^T] of the layer's inputs, (in, in), or their diagonal (in,), see
            ``loftq.inputs.moments``. Every method reports the output error by them; "loftq" and "pissa" don't
            otherwise look at them.
        method: a registered way to the start: "loftq", "qera-diag", "qera", "pissa", "srr", "cloq", "aligned".
        solver: of the decomposition, see ``qlora_kit.lowrank.truncated_svd``.
        seed: makes runs of solvers that draw random numbers repeatable; the exact ones draw none.
        cross: for "aligned": E[x x^^T] (in, in), of the original model's inputs x with those x^ of ``statistics``.
        damping: share of the mean square that is added to each input's own; None is 0.01, or what the ``half``
            says, see ``alignment.trusted_damping``.
        scale_search: search the scales of blocks (True), take them from the largest magnitudes (False), or as the
            method does (None).
        factors: where what is made of ``statistics`` and ``cross`` is kept for other weights with the same.
        half: for "aligned": the same moments of about half of the inputs. How far to follow the text is then
            decided on the inputs that it isn't decided from, see ``alignment``.
        adapter_aware: for "cloq" and "aligned": round so that the adapter takes most of the error back, see
            ``leaning``; the quantized weight is then of no use without its adapter. None is the
            method's own choice: True for "aligned".
        shortfall: for "aligned": E[(h - h^) x^^T] (out, in), h being what the layer's output is added to, in the
            original model and, as h^, in the one that ``statistics`` are of.

    Raises:
        ConfigError: an argument can't work; names it.
    """
    check_matrix(weight, rank, "weight")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps: expected an integer of at least 1, found {steps!r}; 5 is a good choice")
    if damping is not None:
        check_positive("damping", damping, "pass damping=0.01")
    solve = method_for(method)
    if needs_of(method).statistics and statistics is None:
        raise ConfigError(
            f"statistics: expected second moments of the layer's inputs for method {method!r}, found None; collect "
            "them with loftq.collect_statistics, or use method='loftq'"
        )
    half = checked_half(half, weight)
    if half is not None and factors is None:
        factors = Factors()  # what the halves say serves more than one question
    statistics = checked_once(factors, statistics, weight, checked_statistics)
    cross = checked_once(factors, cross, weight, checked_cross)
    if half is not None and (cross is None or statistics is None or statistics.dim() != 2):
        raise ConfigError(
            "half: expected the moments of all inputs beside those of a part, statistics (in, in) and cross, found "
            "one of them missing; pass all, or no half"
        )
    shortfall = checked_shortfall(shortfall, weight)
    if shortfall is not None and (cross is None or (half is not None and half.shortfall is None)):
        raise ConfigError(
            "shortfall: expected it beside cross, and beside the half's own where there is a half, found one of them "
            "missing; pass all, or no shortfall"
        )
    problem = Problem(
        weight.detach().float().contiguous(),  # the methods look at it block by block, in the order of its rows
        rank,
        scaling,
        quantizer_for(bits=bits, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant),
        steps,
        statistics,
        solver,
        seed,
        cross,
        damping_for(damping, statistics, cross, half, factors),
        scale_search,
        factors,
        half,
        adapter_aware,
        shortfall,
    )
    result = solve(problem)
    if problem.statistics is None:
        return result
    full, stored = problem.weight, result.quantized.dequantize()
    goal = full if result.goal is None else result.goal
    left = goal - stored - delta(result.A, result.B, scaling)
    return replace(
        result,
        output_error=output_norm(left, problem.statistics) / (output_norm(goal, problem.statistics) or 1.0),
        zero_output_error=problem.zero_norms[1] / (output_norm(full, problem.statistics) or 1.0),
    )


def checked_once(
    factors: Factors | None,
    moments: Tensor | None,
    weight: Tensor,
    check: Callable[[Tensor | None, Tensor], Tensor | None],
) -> Tensor | None:
    """``check(moments, weight)``: of weights with the same inputs once, and then the same tensor."""
    if moments is None:
        return None
    key = check.__name__, weight.device, weight.shape[1]
    return made(factors, (moments,), key, lambda: check(moments, weight))
