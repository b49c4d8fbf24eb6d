"""LoftQ's alternation (Li et al. 2023, arXiv 2310.08659, Algorithm 1): a quantized weight and a low-rank branch
that together come closest to the full weight W (out, in).

    B = A = 0
    repeat:  Q = quantize(W - s B A);   s B A = the best rank-r approximation of W - Q

Three points where implementations differ decide whether it helps:

- The branch is multiplied by the adapter's scaling s when it runs, so s B A is what has to be the correction.
- Quantization comes first. The first iterate is then the plain quantized weight with its residual's best
  correction, and can't be worse than the zero start of the same weight.
- Neither half-step knows the other, so the error may rise. The best iterate is returned, and the loop ends at
  the first step that is no better than the best before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import check_matrix, delta, factor_pair, truncated_svd

from .quantizers import Quantized, quantizer_for


@dataclass(frozen=True)
class LoftQResult:
    """W ~ ``quantized.dequantize() + scaling * B @ A``.

    Attributes:
        quantized: the best iterate's quantized weight.
        A, B: its factors, float32 (rank, in) and (out, rank), singular values shared evenly.
        history: relative error ||W - Q - s B A|| / ||W|| (Frobenius) after each step that ran; 0 where W is 0.
        zero_error: the same of the zero start, ||W - quantize(W)|| / ||W||.
    """

    quantized: Quantized
    A: Tensor
    B: Tensor
    history: list[float]
    zero_error: float

    @property
    def error(self) -> float:
        """The relative error of what is returned: the least of ``history``."""
        return min(self.history)


@torch.no_grad()
def factorize(
    weight: Tensor,
    rank: int,
    *,
    bits: int = 4,
    quant_type: str | None = None,
    steps: int = 5,
    scaling: float = 1.0,
    blocksize: int = 64,
    double_quant: bool = False,
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
        solver: of the decomposition, see ``qlora_kit.lowrank.truncated_svd``.
        seed: makes runs of solvers that draw random numbers repeatable; the exact ones draw none.

    Raises:
        ConfigError: an argument can't work; names it.
    """
    check_matrix(weight, rank, "weight")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(f"steps: expected an integer of at least 1, found {steps!r}; 5 is a good choice")
    quantize = quantizer_for(bits=bits, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    full = weight.detach().float()
    size = _norm(full) or 1.0

    quantized = quantize(full)
    zero_error = _norm(full - quantized.dequantize()) / size
    history: list[float] = []
    while True:
        residual = full - quantized.dequantize()
        A, B = correction(residual, rank, scaling, solver=solver)
        branch = delta(A, B, scaling)
        history.append(_norm(residual - branch) / size)
        if history[-1] == min(history):
            best = quantized, A, B
        if len(history) == steps or (len(history) > 1 and history[-1] >= history[-2]):
            return LoftQResult(*best, history, zero_error)
        quantized = quantize(full - branch)


def correction(residual: Tensor, rank: int, scaling: float, *, solver: str = "auto") -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) with ``scaling * B @ A`` the closest to ``residual`` (out, in) of that rank."""
    return factor_pair(*truncated_svd(residual, rank, solver=solver), scaling)


def _norm(matrix: Tensor) -> float:
    # Accumulated in float64: errors of steps that differ in the seventh digit are compared.
    return float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
