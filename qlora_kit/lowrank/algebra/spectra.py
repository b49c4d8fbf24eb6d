"""Combinations that work on the spectrum: KnOTS aligns adapters in one basis, Iso-C levels the merged one.

**KnOTS** (Stoica et al. 2024, arXiv 2410.19735). The deltas side by side have one SVD,

    [delta_1, delta_2, ...] = U diag(S) [V_1^T, V_2^T, ...],

so that delta_i = U (diag(S) V_i^T): coordinates of all adapters in the same orthonormal basis U of outputs. TIES on
these coordinates (pruned with S in them, as the authors' code has it) compares like with like, where TIES on weights
compares entries that happen to share a place. U has at most p columns, the sum of the ranks, so the result is of
low rank as it stands. The wide matrix is never formed: with A_i^T = P_i T_i it is [s_i B_i T_i^T, ...] times a
matrix with orthonormal rows, so U, S and the coordinates come from the SVD of that tall (out, p) matrix.
Each column of U is turned so that its largest entry is positive, since elections aren't blind to signs.
The authors prune over the whole model's entries; here each module is pruned by itself, as all types here do.

**Iso-C** (Marczak et al. 2025, arXiv 2502.04959). The singular values of the weighted sum are replaced by their
mean: directions that many adapters share no longer outweigh those that one adapter brought. The paper's deltas have
full rank. A sum of low-rank ones has directions of value zero, which belong to no adapter and whose vectors are
arbitrary: the mean is over those that aren't zero, or over the ``rank`` largest of them.
"""

from __future__ import annotations

import torch

from .exact import all_but_noise, core_svd, exact_rank, from_triplets, weighted_stack
from .pruning import disjoint_mean, keep_largest
from .records import Branch, Combined, result_dtype
from .registry import Recipe, register_combination


@register_combination("knots", ranked=True, density=True)
def knots(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
    """TIES on the adapters' coordinates in the basis that their deltas, side by side, have in common."""
    dtype, density = result_dtype(branches), recipe.density
    assert density is not None
    thin = [torch.linalg.qr(branch.A.double().T) for branch in branches]  # A_i^T = P_i T_i
    tall = torch.cat([b.B.double() @ T.T * b.scaling for b, (_, T) in zip(branches, thin, strict=True)], 1)
    eye = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
    U, S, right, _ = core_svd(eye, tall, lambda values, noise: max(1, exact_rank(values, noise, dtype)))
    # Singular vectors have no sign of their own, and where adapters tie plus is elected.
    turned = U.gather(0, U.abs().argmax(0, keepdim=True)).sign().squeeze(0)
    U, right = U * turned, right * turned[:, None]
    pieces = (S[:, None] * right).split([P.shape[1] for P, _ in thin], 1)  # diag(S) V_i^T P_i
    coordinates = [piece @ P.T for piece, (P, _) in zip(pieces, thin, strict=True)]
    merged = disjoint_mean([keep_largest(c, density) for c in coordinates], weights, recipe.majority_sign)
    return from_triplets(core_svd(merged, U, all_but_noise(recipe, dtype)), recipe, dtype)


@register_combination("iso_c", ranked=True)
def iso_c(branches: list[Branch], weights: list[float], recipe: Recipe) -> Combined:
    """The weighted sum of the deltas with all of its singular values replaced by their mean."""
    dtype = result_dtype(branches)
    U, S, Vh, values = core_svd(*weighted_stack(branches, weights), all_but_noise(recipe, dtype))
    # captured and error are of the directions that a rank leaves out, before they are levelled.
    return from_triplets((U, torch.full_like(S, S.sum().item() / max(1, S.numel())), Vh, values), recipe, dtype)
