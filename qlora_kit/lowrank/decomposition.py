"""The best rank-r pair of a matrix.

By Eckart and Young (1936) the closest matrix of rank r, in the Frobenius norm, keeps the r largest singular
triplets. Two exact ways to them are offered:

- ``full``: a complete SVD, O(m n min(m, n)) with a large constant;
- ``gram``: the r largest eigenpairs of the smaller Gram matrix (M M^T or M^T M), which is several times
  cheaper where r is well below min(m, n). Squaring the matrix squares its condition number, so the Gram
  matrix is formed and decomposed in float64: a singular value comes out with a relative error of about
  eps64 * (S[0] / S[i])^2, which is below float32's own rounding as long as S[i] > 3e-5 * S[0]. Where the
  smallest wanted value is under that (a matrix of rank below r, say), the full SVD takes over.

And two that cost a few products with r columns each, O(m n r), and get close. With Y orthonormal, Y Y^T M is the
best approximation in the span of Y, so the one question is how much of the r largest triplets' energy (the sum
of squared singular values) the span holds:

- ``krylov``: the span of M V, (M M^T) M V, ..., ``depth`` blocks of r columns, 16 at least (Musco and Musco 2015, arXiv
  1504.05477), V random. The residual of a quantization has a flat spectrum, the hardest case; on one of
  2048 x 2048, r = 64, depths 4, 6 and 8 hold 0.956, 0.990 and 0.998 of the optimal energy.
- ``subspace``: only the last of these blocks (Halko, Martinsson and Tropp 2011, arXiv 0909.4061), which keeps
  less memory and gets less: 0.89 at depth 4 and 0.96 at 8.

Both take a ``start``: columns that span nearly the right space, from a similar matrix. Two blocks then do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError

SOLVERS = ("auto", "full", "gram", "krylov", "subspace")
# Blocks from a random start, and from a given one.
COLD_DEPTH, WARM_DEPTH = 6, 2

# Below this share of the largest singular value the Gram route's error would exceed float32's rounding:
# sqrt(eps64 / eps32) = 4.3e-5 up to the constant in the eigensolver's error bound.
_GRAM_FLOOR = 1e-4
# Products with fewer columns than this cost as much, and more columns hold more energy.
LEAST_COLUMNS = 16
# Columns farther from orthogonal than this aren't a basis.
_ORTHOGONAL = 1e-3
# Where the Gram route starts to pay: small matrices are quick in full, and large shares of the spectrum
# cost the partial eigensolver as much as all of it.
_GRAM_MIN_SIZE = 128
_GRAM_MAX_SHARE = 0.25
# Where an approximation does for "auto": there the exact ways take seconds.
_KRYLOV_MIN_SIZE = 1024


@torch.no_grad()
def truncated_svd(
    matrix: Tensor,
    rank: int,
    *,
    solver: str = "auto",
    start: Tensor | None = None,
    depth: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The ``rank`` largest singular triplets of ``matrix``: U diag(S) Vh is its best rank-r approximation.

    Args:
        matrix: (out, in), any floating dtype and device; float64 stays float64, the rest computes in float32.
        rank: between 1 and min(out, in).
        solver: "full", "gram" (falls back to "full" where it would be inaccurate), "krylov", "subspace", or
            "auto": exact below 1024 rows or columns, from there "krylov" if the rank is small.
        start: (out, any number), columns near the wanted ones, such as the U of a similar matrix; only the
            approximate solvers use it.
        depth: blocks that the approximate solvers take; None is 6, or 2 from a start.
        seed: of the approximate solvers' random start.

    Returns:
        U (out, rank) and Vh (rank, in) with orthonormal columns and rows, S (rank,) descending.

    Raises:
        ConfigError: the matrix isn't 2-D or holds a NaN or infinity, or rank or solver is out of range.
    """
    check_matrix(matrix, rank)
    if solver not in SOLVERS:
        raise ConfigError(f"solver: expected one of {', '.join(SOLVERS)}, found {solver!r}; pick one of these")
    if start is not None and (start.dim() != 2 or start.shape[0] != matrix.shape[0] or not start.isfinite().all()):
        raise ConfigError(
            f"start: expected finite columns of {matrix.shape[0]} rows, found {tuple(start.shape)}, or NaN or infinite "
            "values; pass the U of a similar matrix, or leave it out"
        )
    work = matrix.detach()
    if work.dtype != torch.float64:
        work = work.float()
    if solver == "auto":
        solver = pick_solver(work.shape, rank)
    triplets = None
    if solver in ("krylov", "subspace"):
        triplets = _block_svd(work, rank, solver == "krylov", start, depth, seed)
    elif solver == "gram" and work.dtype != torch.float64:
        # A float64 matrix is asked for more digits than squaring it in float64 leaves.
        triplets = _gram_svd(work, rank)
    if triplets is not None:
        return triplets
    U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    return U[:, :rank].contiguous(), S[:rank].clone(), Vh[:rank].contiguous()


def pick_solver(shape: torch.Size | tuple[int, ...], rank: int) -> str:
    """What "auto" is for a matrix of that shape."""
    size = min(shape)
    if size >= _KRYLOV_MIN_SIZE and 2 * COLD_DEPTH * rank <= size:
        return "krylov"
    return "gram" if size >= _GRAM_MIN_SIZE and rank <= _GRAM_MAX_SHARE * size else "full"


def factor_pair(U: Tensor, S: Tensor, Vh: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter pair with ``scaling * B @ A = U diag(S) Vh``, the singular values shared evenly.

    Row i of A and column i of B both have norm sqrt(S[i] / scaling), so that a step of a gradient descent
    moves both at the same rate.

    Args:
        U: (out, rank). S: (rank,). Vh: (rank, in). scaling: the adapter's positive multiplier.

    Returns:
        A (rank, in) and B (out, rank) in the dtype of the triplets.

    Raises:
        ConfigError: scaling isn't a positive finite number.
    """
    if not (math.isfinite(scaling) and scaling > 0):
        raise ConfigError(
            f"scaling: expected a positive finite number, found {scaling!r}; "
            "no branch can hold a correction when its output is multiplied by that, so raise lora_alpha"
        )
    root = (S / scaling).sqrt()
    return root[:, None] * Vh, U * root


def check_matrix(matrix: Tensor, rank: int, name: str = "matrix") -> None:
    """Refuse what has no rank-``rank`` approximation; messages call it ``name``.

    Raises:
        ConfigError: not 2-D, not floating, a NaN or infinity, or rank outside [1, min(out, in)].
    """
    if matrix.dim() != 2 or not matrix.is_floating_point():
        raise ConfigError(
            f"{name}: expected a 2-D floating-point tensor (out, in), found {matrix.dtype} with shape "
            f"{tuple(matrix.shape)}; pass the weight as its codec reads it"
        )
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(matrix.shape):
        raise ConfigError(
            f"rank: expected an integer between 1 and {min(matrix.shape)} for shape {tuple(matrix.shape)}, "
            f"found {rank!r}; lower r, for this module alone with rank_pattern if need be"
        )
    if matrix.dtype.itemsize < 2:  # of which torch finds no extremes
        matrix = matrix.float()
    # The extremes are finite just where all is, and take no temporary.
    if not (matrix.amax(dim=1).isfinite().all() and matrix.amin(dim=1).isfinite().all()):
        bad = int((~torch.isfinite(matrix)).sum())
        raise ConfigError(
            f"{name}: expected finite values, found {bad} NaN or infinite of {matrix.numel()}; "
            "repair the checkpoint or leave the module out of the targets"
        )


def _gram_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets through the smaller Gram matrix in float64, or None where that would be inaccurate."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = (matrix.T if wide else matrix).double()
    values, vectors = _top_eigenpairs(tall.T @ tall, rank)
    S = values.clamp_min(0).sqrt()
    if S[-1] <= _GRAM_FLOOR * S[0]:
        return None
    other = (tall @ vectors) / S
    U, V = (vectors, other) if wide else (other, vectors)
    dtype = matrix.dtype
    return U.to(dtype).contiguous(), S.to(dtype), V.T.to(dtype).contiguous()


def _new_directions(grown: Tensor, Y: Tensor) -> Tensor:
    """Orthonormal columns that ``grown`` adds to the span of the orthonormal ``Y``; none where it adds only rounding.

    A matrix whose own rank is used up gives columns that are rounding noise once ``Y`` is taken out of them;
    normalized, that noise would count as directions, and partly lie in ``Y``'s span again.
    """
    grown = grown / grown.abs().max().clamp_min(torch.finfo(grown.dtype).tiny)  # squares of it must not overflow
    block, R = torch.linalg.qr(grown - Y @ (Y.T @ grown))
    noise = 100 * torch.finfo(grown.dtype).eps * grown.norm(dim=0).max()
    if R.diagonal().abs().min() <= noise:
        mixing, sizes, _ = torch.linalg.svd(R)
        block = block @ mixing[:, sizes > noise]
    # Once more: what rounding left of Y grew as the block was normalized.
    return torch.linalg.qr(block - Y @ (Y.T @ block)).Q if block.shape[1] else block


def _block_svd(
    matrix: Tensor, rank: int, keep_all: bool, start: Tensor | None, depth: int | None, seed: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The triplets of ``matrix`` in the span of ``depth`` Krylov blocks, or of the last of them alone; None where
    the matrix's own rank is too low for them."""
    out_features, in_features = matrix.shape
    depth = depth or (COLD_DEPTH if start is None else WARM_DEPTH)
    columns = min(max(rank, LEAST_COLUMNS), out_features, in_features)
    block = matrix.new_empty(out_features, 0) if start is None else start.detach().to(matrix)
    if (missing := columns - block.shape[1]) > 0:
        generator = torch.Generator(matrix.device).manual_seed(seed)
        drawn = torch.randn(in_features, missing, dtype=matrix.dtype, device=matrix.device, generator=generator)
        block = torch.cat([block, matrix @ drawn], 1)
    if keep_all:  # no more columns than there are dimensions
        depth = max(1, min(depth, min(out_features, in_features) // block.shape[1]))
    Y = block = torch.linalg.qr(block).Q
    Z = matrix.T @ block
    for _ in range(depth - 1):
        grown = matrix @ Z[:, -block.shape[1] :]
        if keep_all:
            block = _new_directions(grown, Y)
            if block.shape[1] == 0:
                break
            Y, Z = torch.cat([Y, block], 1), torch.cat([Z, matrix.T @ block], 1)
        else:
            Y = block = torch.linalg.qr(grown).Q
            Z = matrix.T @ block
    if ((Y.T @ Y).diagonal_scatter(Y.new_zeros(Y.shape[1])).abs().max() > _ORTHOGONAL) or not Z.isfinite().all():
        return None
    # Y Y^T M = Y Z^T, whose triplets are those of the thin Z, through its small Gram matrix.
    wide = Z.double()
    values, mixing = torch.linalg.eigh(wide.T @ wide)
    S = values[-rank:].flip(0).clamp_min(0).sqrt()
    if S.numel() < rank or S[-1] <= _GRAM_FLOOR * S[0]:
        return None
    kept = mixing[:, -rank:].flip(1).to(matrix.dtype)
    S = S.to(matrix.dtype)
    return (Y @ kept).contiguous(), S, ((Z @ kept) / S).T.contiguous()


def _top_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues, descending, and their eigenvectors in columns."""
    if gram.device.type == "cpu":
        # LAPACK's evr finds a part of the spectrum; torch only offers all of it.
        from scipy.linalg import eigh

        size = gram.shape[0]
        found = eigh(gram.numpy(), subset_by_index=[size - rank, size - 1], driver="evr", check_finite=False)
        values, vectors = (torch.from_numpy(part) for part in found)
    else:
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values[-rank:], vectors[:, -rank:]
    return values.flip(0), vectors.flip(1)
