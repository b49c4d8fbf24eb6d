"""What goes into a combination and what comes out: a branch, and a branch with an account of what it left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import AdapterError


@dataclass(frozen=True)
class Branch:
    """One adapter's part of one module: it adds ``scaling * B @ A`` to the weight.

    Attributes:
        A: (rank, in), any floating dtype. B: (out, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) with rslora.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the delta."""
        return self.B.shape[0], self.A.shape[1]

    def check(self, where: str) -> None:
        """Refuse what isn't a finite pair of matrices; messages begin with ``where``.

        Raises:
            AdapterError: two shapes that don't make a product, no memory, NaN or infinite values.
        """
        A, B = self.A, self.B
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not self.rank:
            raise AdapterError(
                f"{where}: expected factors A (rank, in) and B (out, rank), found {tuple(A.shape)} and "
                f"{tuple(B.shape)}; pass the canonical factors of one adapter"
            )
        if A.is_meta or B.is_meta:
            raise AdapterError(f"{where}: expected factors with memory, found some on the meta device; load them first")
        bad = sum(int((~torch.isfinite(factor)).sum()) for factor in (A, B))
        if bad or not math.isfinite(self.scaling):
            raise AdapterError(
                f"{where}: expected finite factors and scaling, found {bad} NaN or infinite values and scaling "
                f"{self.scaling!r}; leave this adapter out, or train it again"
            )


@dataclass(frozen=True)
class Combined:
    """The result for one module: it adds ``B @ A`` (scaling 1) to the weight.

    ``captured`` and ``error`` compare with what the combination type gives before its rank is cut: the share of
    the squared Frobenius norm that is kept, and ||kept - all|| / ||all||. ``distance`` compares with the plain
    weighted sum of the deltas instead, so it counts pruning, sign election and cross terms too; it is the
    relative Frobenius distance, to about 1e-7.

    Attributes:
        A: (rank, in) and B: (out, rank), float32; float64 where a source was.
    """

    A: Tensor
    B: Tensor
    captured: float = 1.0
    error: float = 0.0
    distance: float = 0.0

    @property
    def rank(self) -> int:
        return self.A.shape[0]


#: What a report says of ``one_rank``.
FILLED_UP = (
    "all factors filled up with zeros to rank {}, since servers know one scale for all modules; own_ranks=True leaves "
    "each its own"
)


def one_rank(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """``pairs`` of A (rank, in) and B (out, rank) by path, all with the largest of their ranks: zeros are added.

    PEFT reads a rank and an alpha for each module. Servers don't: vLLM takes one alpha / r for all modules, llama.cpp
    divides one alpha by the rank of each tensor. Where all ranks are one, all of them compute the same.
    """
    rank = max(A.shape[0] for A, _ in pairs.values())
    return {path: (_filled(A, 0, rank), _filled(B, 1, rank)) for path, (A, B) in pairs.items()}


def _filled(factor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(factor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([factor, factor.new_zeros(shape)], dim) if shape[dim] else factor


def result_dtype(branches: list[Branch]) -> torch.dtype:
    """float64 if any factor is, else float32."""
    double = any(factor.dtype == torch.float64 for branch in branches for factor in (branch.A, branch.B))
    return torch.float64 if double else torch.float32
