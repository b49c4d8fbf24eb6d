"""Branches for the tests of the algebra, and their arrays for the reference."""

from __future__ import annotations

import numpy as np
import torch
from reference import algebra as reference

from qlora_kit.lowrank.algebra import Branch, Combined

PRUNING = ("ties", "dare_ties", "dare_linear", "magnitude_prune")
DENSITY_TYPES = (*PRUNING, *(f"{name}_svd" for name in PRUNING), "knots")


def branches(
    ranks: tuple[int, ...] = (3, 3, 3),
    shape: tuple[int, int] = (17, 23),
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scalings: tuple[float, ...] = (2.0, 0.5, 1.25, 3.0),
) -> list[Branch]:
    generator = torch.Generator().manual_seed(seed)
    out, width = shape
    made = []
    for i, rank in enumerate(ranks):
        A, B = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((rank, width), (out, rank)))
        made.append(Branch(A.to(dtype), B.to(dtype), scalings[i % len(scalings)]))
    return made


def arrays(given: list[Branch]) -> list[reference.Branch]:
    return [(b.A.double().numpy(), b.B.double().numpy(), b.scaling) for b in given]


def product(found: Combined | Branch) -> np.ndarray:
    scaling = found.scaling if isinstance(found, Branch) else 1.0
    return scaling * (found.B.double() @ found.A.double()).numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), 1e-30))
