"""Sums of low-rank terms, exactly: stack, QR, and the SVD of a small core.

The weighted sum of deltas is one product of stacked factors,

    sum_i w_i s_i B_i A_i = B^ A^,    B^ = [w_1 s_1 B_1, w_2 s_2 B_2, ...],    A^ = [A_1; A_2; ...],

of rank p at most, the sum of the ranks. With B^ = Q R and A^T = P T the singular values are those of the p x p core
R T^T, and its singular vectors turned by Q and P are the sum's: O((out + in) p^2 + p^3) where a decomposition of the
dense (out, in) sum takes O(out in min(out, in)), for the same result. By Eckart and Young, cutting the triplets at k
is the best approximation of rank k of the sum itself.

All of it is float64, whatever comes in. The factors are thin, so that costs little, and it makes the rank of the sum
a fact that can be read off: adapters that share directions give singular values of 1e-16, not of float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import factor_pair
from .records import Branch, Combined, result_dtype
from .registry import Recipe, register_combination

_EPS = torch.finfo(torch.float64).eps


def weighted_stack(branches: Sequence[Branch], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A^ (p, in) and B^ (out, p) in float64, with ``B^ @ A^`` the weighted sum of the deltas."""
    A = torch.cat([branch.A.to(torch.float64, copy=True) for branch in branches])
    B = torch.cat([b.B.to(torch.float64) * (w * b.scaling) for b, w in zip(branches, weights, strict=True)], 1)
    return A, B


def core_svd(A: Tensor, B: Tensor, keep: Callable[[Tensor, float], int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest singular triplets of ``B @ A``, without forming it.

    Args:
        A: (p, in) and B: (out, p), float64.
        keep: how many triplets to return, from all singular values, descending, and the size that their rounding
            errors may have.

    Returns:
        U (out, k), S (k,), Vh (k, in), and all min(p, out, in) singular values.
    """
    Q, R = torch.linalg.qr(B)
    P, T = torch.linalg.qr(A.T)
    left, values, right = torch.linalg.svd(R @ T.T, full_matrices=False)
    noise = 4 * math.sqrt(values.numel()) * _EPS * (R.norm() * T.norm()).item()
    kept = keep(values, noise)
    return Q @ left[:, :kept], values[:kept], right[:kept] @ P.T, values


def exact_rank(values: Tensor, noise: float, dtype: torch.dtype) -> int:
    """How many of the singular values aren't rounding errors: of their computation, or of factors in ``dtype``.

    The tail that is cut has a norm of at most ``noise``, or of ``dtype``'s epsilon times the whole's.
    """
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[k]: the norm of what rank k leaves out
    allowed = max(noise, torch.finfo(dtype).eps * tails[0].item())
    return int((tails > allowed).sum())


def rank_for_energy(values: Tensor, energy: float) -> int:
    """The fewest of ``values`` whose squares sum to the share ``energy`` of all squares."""
    squares = values.square().cumsum(0)
    return min(int((squares < energy * squares[-1]).sum()) + 1, values.numel())


def all_but_noise(recipe: Recipe, dtype: torch.dtype) -> Callable[[Tensor, float], int]:
    """For ``core_svd``: the exact rank, or less where ``recipe`` asks for a rank or an energy."""

    def keep(values: Tensor, noise: float) -> int:
        rank = exact_rank(values, noise, dtype)
        if rank and recipe.energy is not None:
            rank = min(rank, rank_for_energy(values, recipe.energy))
        return rank if recipe.rank is None else min(rank, recipe.rank)

    return keep


def from_triplets(triplets: tuple[Tensor, Tensor, Tensor, Tensor], recipe: Recipe, dtype: torch.dtype) -> Combined:
    """The adapter of ``core_svd``'s result, with the account of what it leaves out."""
    U, S, Vh, values = triplets
    if S.numel() == 0:  # the zero matrix: an adapter has rank 1 at least
        return Combined(U.new_zeros(1, Vh.shape[1]).to(dtype), U.new_zeros(U.shape[0], 1).to(dtype))
    captured, error = account(values, S.numel())
    A, B = split(U, S, Vh, recipe.clamp)
    return Combined(A.to(dtype), B.to(dtype), captured, error)


def account(values: Tensor, kept: int, total: float | None = None) -> tuple[float, float]:
    """(captured energy, relative error) of keeping the first ``kept`` of ``values``.

    ``total`` is the energy of the whole where ``values`` aren't all that there is.
    """
    held = values[:kept].square().sum().item()
    lost = values[kept:].square().sum().item() if total is None else max(0.0, total - held)
    whole = held + lost
    return (held / whole, math.sqrt(lost / whole)) if whole > 0 else (1.0, 0.0)


def split(U: Tensor, S: Tensor, Vh: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    """A (k, in) and B (out, k) with ``B @ A = U diag(S) Vh``; with ``clamp``, their extreme values cut off.

    Without it both factors carry the roots of the singular values. With it, B = U diag(S) and A = Vh are cut at plus
    and minus the ``clamp`` quantile of all their entries and these entries' negatives: singular vectors have no sign
    of their own, so their quantile mustn't depend on one.
    """
    if clamp is None:
        return factor_pair(U, S, Vh, 1.0)
    A, B = Vh, U * S
    sizes = torch.cat([A.flatten(), B.flatten()]).abs().sort().values
    place = (2 * clamp - 1) * (sizes.numel() - 1)  # a quantile q of a symmetric sample is 2 q - 1 of its sizes
    low, high = sizes[math.floor(place)], sizes[math.ceil(place)]
    bound = (low + (high - low) * (place - math.floor(place))).item()
    return A.clamp(-bound, bound), B.clamp(-bound, bound)


def distance(branches: Sequence[Branch], weights: Sequence[float], found: Combined) -> float:
    """||B A - sum of w_i s_i B_i A_i|| / ||the sum||, from Gram matrices of the thin factors, to about 1e-7."""
    A, B = weighted_stack(branches, weights)
    both_A, both_B = torch.cat([A, found.A.double()]), torch.cat([B, -found.B.double()], 1)
    # ||B A||^2 = <B^T B, A A^T>.
    products = (both_B.T @ both_B) * (both_A @ both_A.T)
    p = A.shape[0]
    whole, apart = products[:p, :p].sum().item(), products.sum().item()
    scale = torch.linalg.vector_norm(products.diagonal()).item()
    if apart <= 16 * _EPS * scale:
        return 0.0
    return math.sqrt(apart / whole) if whole > 16 * _EPS * scale else math.inf


@register_combination("exact", ranked=True, energy=True)
def exact(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
    """The weighted sum of the deltas, task arithmetic without cross terms, in the smallest rank that holds it.

    A rank or an energy cuts it to the best approximation of that.
    """
    dtype = result_dtype(branches)
    return from_triplets(core_svd(*weighted_stack(branches, weights), all_but_noise(recipe, dtype)), recipe, dtype)


@register_combination("svd", ranked=True, largest_rank=True, energy=True, clamp=True)
def svd(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
    """The best approximation, in the given rank, of the weighted sum of the deltas."""
    if recipe.energy is not None:
        return exact(branches, weights, recipe)
    largest = max(branch.rank for branch in branches)

    def keep(values: Tensor, noise: float) -> int:
        return min(recipe.rank or largest, values.numel())

    return from_triplets(core_svd(*weighted_stack(branches, weights), keep), recipe, result_dtype(branches))


@register_combination("cat")
def cat(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
    """The weighted sum of the deltas as the stacked factors themselves: the ranks add up.

    As in PEFT the weight and the scaling go to A.
    """
    dtype = result_dtype(branches)
    A = torch.cat([b.A.to(dtype) * (w * b.scaling) for b, w in zip(branches, weights, strict=True)])
    return Combined(A, torch.cat([branch.B.to(dtype) for branch in branches], 1))
