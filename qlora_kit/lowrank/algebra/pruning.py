"""Combinations that work entry by entry: pruning, sign election, means.

Two choices make each of the published types:

    how each adapter is pruned     not at all; its largest entries kept (magnitude); or entries dropped at random and
                                   the rest divided by the share that is kept, which keeps the expectation (DARE,
                                   Yu et al. 2023, arXiv 2311.03099)
    how the pruned ones are put    their weighted sum; or, entry by entry, the mean of the weighted values whose sign
    together                       is the elected one (TIES, Yadav et al. 2023, arXiv 2306.01708)

and each of them is offered on two things: on the deltas themselves (the names that end in ``_svd``: the result has
no low rank, so its best approximation of the wanted rank is kept, and the share of energy that it holds reported),
and on the factors A and B apart, as PEFT has it. The latter is cheap and an approximation only: with u_i the root of
the weight times the scaling, (sum u_i B_i)(sum u_i A_i) holds a cross term u_i u_j B_i A_j for each pair of adapters
that the weighted sum of deltas doesn't. ``Combined.distance`` says how far off it is.

Signs are elected as PEFT does it: by the unweighted values, a tie going to plus, and the mean divides by the number
of values that agree. Electing by the weighted values and dividing by their weights is another published reading
(mergekit's), not offered here. An adapter that a module lacks counts as zeros, which vote for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import truncated_svd
from .exact import account, split
from .records import Branch, Combined, result_dtype
from .registry import Recipe, register_combination

# Krylov blocks, for large deltas: what pruning leaves has a few large directions over a flat rest, and this many find
# them to float32's rounding, for a fraction of an exact decomposition's time.
_DEPTH = 10

Prune = Callable[[Tensor, float, torch.Generator], Tensor]
Merge = Callable[[Sequence[Tensor], Sequence[float], str], Tensor]


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """``tensor`` with all but the floor(density * entries) largest magnitudes set to zero."""
    if density >= 1:
        return tensor
    flat = tensor.reshape(-1)
    kept = flat.abs().topk(int(density * flat.numel()), sorted=False).indices
    return torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view(tensor.shape)


def drop_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it, else zero."""
    if density >= 1:
        return tensor
    mask = torch.bernoulli(torch.full(tensor.shape, density, dtype=tensor.dtype), generator=generator)
    return tensor * mask.to(tensor.device) / density


def elected_sign(tensors: Sequence[Tensor], method: str) -> Tensor:
    """+1 or -1 for each entry: the sign of the sum of the values ("total") or of their signs ("frequency")."""
    votes = torch.zeros_like(tensors[0])
    for tensor in tensors:
        votes += tensor if method == "total" else tensor.sign()
    return torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float], method: str = "total") -> Tensor:
    """Sum of weight * tensor; ``method`` is here for ``disjoint_mean``'s sake."""
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor * weight
    return total


def disjoint_mean(tensors: Sequence[Tensor], weights: Sequence[float], method: str = "total") -> Tensor:
    """For each entry the mean of weight * value over the tensors whose value has the elected sign; 0 without any."""
    elected = elected_sign(tensors, method)
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for tensor, weight in zip(tensors, weights, strict=True):
        agrees = tensor.sign() == elected
        total += tensor * weight * agrees
        count += agrees
    return total / count.clamp_min(1)


@dataclass(frozen=True)
class Entrywise:
    """A way to prune and a way to put together."""

    prune: Prune
    merge: Merge

    def __call__(
        self, tensors: Sequence[Tensor], weights: Sequence[float], recipe: Recipe, generator: torch.Generator
    ) -> Tensor:
        density = 1.0 if recipe.density is None else recipe.density
        pruned = [self.prune(tensor, density, generator) for tensor in tensors]
        return self.merge(pruned, weights, recipe.majority_sign)


def _by_magnitude(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    return keep_largest(tensor, density)


LINEAR = Entrywise(_by_magnitude, weighted_sum)  # of density 1
ENTRYWISE = {
    "magnitude_prune": Entrywise(_by_magnitude, weighted_sum),
    "ties": Entrywise(_by_magnitude, disjoint_mean),
    "dare_linear": Entrywise(drop_at_random, weighted_sum),
    "dare_ties": Entrywise(drop_at_random, disjoint_mean),
}


def on_factors(way: Entrywise) -> Callable[[list[Branch], list[float], Recipe], Combined]:
    """``way`` on the A's and on the B's, each weighted with the root of weight * scaling, its sign on A."""

    def combine(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
        dtype, generator = result_dtype(branches), recipe.generator()
        products = [weight * branch.scaling for branch, weight in zip(branches, weights, strict=True)]
        roots = [math.sqrt(abs(product)) for product in products]
        signed = [math.copysign(root, product) for root, product in zip(roots, products, strict=True)]
        A = way([branch.A.to(dtype) for branch in branches], signed, recipe, generator)
        B = way([branch.B.to(dtype) for branch in branches], roots, recipe, generator)
        return Combined(A.clone(), B.clone())

    return combine


def on_deltas(way: Entrywise) -> Callable[[list[Branch], list[float], Recipe], Combined]:
    """``way`` on the dense deltas, then the best approximation of the wanted rank."""

    def combine(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
        dtype = result_dtype(branches)
        deltas = [(branch.B.to(dtype) @ branch.A.to(dtype)) * branch.scaling for branch in branches]
        merged = way(deltas, weights, recipe, recipe.generator())
        rank = min(recipe.rank or max(branch.rank for branch in branches), *merged.shape)
        U, S, Vh = truncated_svd(merged, rank, depth=_DEPTH)
        captured, error = account(S.double(), rank, total=merged.double().square().sum().item())
        A, B = split(U, S, Vh, recipe.clamp)
        return Combined(A, B, captured, error)

    return combine


register_combination("linear", equal_ranks=True)(on_factors(LINEAR))
for _name, _way in ENTRYWISE.items():
    register_combination(_name, density=True, equal_ranks=True)(on_factors(_way))
    register_combination(f"{_name}_svd", density=True, ranked=True, largest_rank=True, clamp=True)(on_deltas(_way))
