"""Starts that look at the inputs, in float64 numpy and by other ways than the library's: square roots by
eigenvectors where it has a triangle, decompositions by projection, error feedback by updating the weights that are
left, scales by trying all, expectations as means over sample inputs."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize


def damped(moments: np.ndarray, damping: float = 0.01) -> np.ndarray:
    """R + damping * mean(diag R) * I, of a matrix or the diagonal of one."""
    full = np.diag(moments) if moments.ndim == 1 else moments
    full = full.astype(np.float64)
    return full + damping * np.trace(full) / len(full) * np.eye(len(full))


def output_error(error: np.ndarray, inputs: np.ndarray) -> float:
    """The mean of ||error @ x||^2 over the rows x of ``inputs``, one after the other."""
    return float(np.mean([np.sum((error.astype(np.float64) @ x) ** 2) for x in inputs.astype(np.float64)]))


def sequential_error(weight: np.ndarray, found: np.ndarray, inputs: np.ndarray, seen: np.ndarray) -> float:
    """The mean of ||weight @ x - found @ x^||^2 over pairs of rows."""
    pairs = zip(inputs.astype(np.float64), seen.astype(np.float64), strict=True)
    return float(np.mean([np.sum((weight @ x - found @ y) ** 2) for x, y in pairs]))


def weighted_error(error: np.ndarray, moments: np.ndarray) -> float:
    """tr(E R E^T), a row at a time."""
    return float(sum(row @ moments @ row for row in error.astype(np.float64)))


def projected(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The closest matrix of that rank: ``matrix`` on its own top left directions."""
    _, vectors = np.linalg.eigh(matrix @ matrix.T)
    top = vectors[:, matrix.shape[0] - rank :]
    return top @ (top.T @ matrix)


def closest_correction(error: np.ndarray, moments: np.ndarray, rank: int) -> np.ndarray:
    """The rank-r matrix C of least tr((E - C) R (E - C)^T), by R's symmetric root (Zhang et al. 2024, theorem 1)."""
    values, vectors = np.linalg.eigh(moments)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    inverse = vectors @ np.diag(1 / np.sqrt(values)) @ vectors.T
    return projected(error.astype(np.float64) @ root, rank) @ inverse


def descended(error: np.ndarray, moments: np.ndarray, rank: int, seed: int) -> float:
    """The least tr((E - B A) R (E - B A)^T) that a long descent over A and B finds from a random start."""
    out_features, width = error.shape
    start = np.random.default_rng(seed).standard_normal((out_features + width) * rank) * 0.1
    size = weighted_error(error, moments)

    def value_and_slope(flat: np.ndarray) -> tuple[float, np.ndarray]:
        B = flat[: out_features * rank].reshape(out_features, rank)
        A = flat[out_features * rank :].reshape(rank, width)
        left = error - B @ A
        slope = -2 * left @ moments
        value = np.sum(left @ moments * left)
        return value / size, np.concatenate([(slope @ A.T).ravel(), (B.T @ slope).ravel()]) / size

    options = {"maxiter": 5_000, "maxfun": 10_000, "maxcor": 20, "ftol": 1e-14, "gtol": 1e-10}
    return float(minimize(value_and_slope, start, jac=True, method="L-BFGS-B", options=options).fun) * size


def brain_surgeon(
    weight: np.ndarray, moments: np.ndarray, levels: np.ndarray, scales: np.ndarray, shifts: np.ndarray
) -> np.ndarray:
    """The rank of the level that each weight takes, column by column (Hassibi and Stork 1993; Frantar et al. 2022).

    After a column is rounded, all that are left move by what makes up for it best, which the inverse of the moments
    of the inputs that are left says; one step of elimination takes an input out of it. Columns go by falling mean
    square; ``scales`` and ``shifts`` are each weight's.
    """
    work, ranks = weight.astype(np.float64).copy(), np.zeros(weight.shape, dtype=np.int64)
    left = sorted(range(weight.shape[1]), key=lambda column: -moments[column, column])
    inverse = np.linalg.inv(moments[np.ix_(left, left)])
    while left:
        column, *left = left
        reachable = scales[:, column, None] * levels[None, :] + shifts[:, column, None]
        ranks[:, column] = np.abs(reachable - work[:, column, None]).argmin(axis=1)
        lost = work[:, column] - reachable[np.arange(len(work)), ranks[:, column]]
        work[:, left] -= np.outer(lost, inverse[0, 1:] / inverse[0, 0])
        inverse = inverse[1:, 1:] - np.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    return ranks


def each_weights(per_block: np.ndarray, shape: tuple[int, int], blocksize: int) -> np.ndarray:
    """A value per block of the row-major weights, as one per weight."""
    flat = [per_block[place // blocksize] for place in range(shape[0] * shape[1])]
    return np.array(flat, dtype=np.float64).reshape(shape)


def least_block_error(block: np.ndarray, weights: np.ndarray, levels: np.ndarray, scaling: str) -> float:
    """The least weighted squared error of a block over a dense grid of scales (and shifts), each also refitted."""
    block, weights, span = block.astype(np.float64), weights.astype(np.float64), np.abs(block).max()
    if span == 0:
        return 0.0
    if scaling == "range":
        low, width = block.min(), block.max() - block.min()
        ends = np.linspace(-0.3, 0.55, 35)
        tried = [(width * (1 - a - b), low + width * a) for a in ends for b in ends if a + b < 0.95]
    else:
        steps = np.linspace(0.05, 1.6, 621) * span
        tried = [(sign * step, 0.0) for step in steps for sign in ((1, -1) if scaling == "signed" else (1,))]
    least = np.inf
    for scale, shift in tried:
        read = levels[np.abs(block[:, None] - scale * levels - shift).argmin(axis=1)]
        columns = np.stack([read, np.ones_like(read)][: 2 if scaling == "range" else 1], axis=1)
        root = np.sqrt(weights)
        fitted = columns @ np.linalg.lstsq(columns * root[:, None], block * root, rcond=None)[0]
        least = min(least, float(weights @ (block - fitted) ** 2))
    return least


def aligned_weight(weight: np.ndarray, inputs: np.ndarray, seen: np.ndarray, pull: float) -> np.ndarray:
    """The V of least mean ||W x - V x^||^2 + pull ||W - V||^2, by least squares over the samples themselves."""
    count, width = inputs.shape
    weight = weight.astype(np.float64)
    rows = np.concatenate([seen / np.sqrt(count), np.sqrt(pull) * np.eye(width)])
    goals = np.concatenate([inputs @ weight.T / np.sqrt(count), np.sqrt(pull) * weight.T])
    return np.linalg.lstsq(rows, goals, rcond=None)[0].T


def error_on_others(
    weight: np.ndarray, found: np.ndarray, moments: np.ndarray, cross: np.ndarray, shortfall: np.ndarray | None = None
) -> float:
    """E ||e + W x - V x^||^2 on inputs of these moments, less E ||e + W x||^2, which V doesn't change, a row at a time.
    ``shortfall`` is E[e x^^T]; None where e is 0."""
    short = np.zeros(weight.shape) if shortfall is None else shortfall
    rows = zip(weight.astype(np.float64), found.astype(np.float64), short, strict=True)
    return float(sum(v @ moments @ v - 2 * (w @ cross + s) @ v for w, v, s in rows))


def change_towards(
    weight: np.ndarray, moments: np.ndarray, cross: np.ndarray, pull: float, shortfall: np.ndarray | None = None
) -> np.ndarray:
    """D = (W (C - R) + S)(R + pull)^-1, by a system for each row."""
    pulled = moments + pull * np.eye(len(moments))
    short = np.zeros(weight.shape) if shortfall is None else shortfall
    goals = [(cross - moments).T @ row + s for row, s in zip(weight.astype(np.float64), short, strict=True)]
    return np.stack([np.linalg.solve(pulled.T, goal) for goal in goals])


def unlikelihood(moments: np.ndarray, others: np.ndarray, pull: float) -> float:
    """-2 log of how likely inputs of moments ``others`` are as Gaussian ones of covariance ``moments`` + pull, by the
    regression of each input on those before it."""
    model, total = moments + pull * np.eye(len(moments)), 0.0
    for k in range(len(model)):
        slope = np.linalg.solve(model[:k, :k], model[:k, k]) if k else np.zeros(0)
        row = np.concatenate([-slope, [1.0]])
        size = row @ model[: k + 1, : k + 1] @ row
        total += row @ others[: k + 1, : k + 1] @ row / size + np.log(size)
    return float(total)


def taken_back(error: np.ndarray, moments: np.ndarray, A: np.ndarray) -> np.ndarray:
    """``error`` less the B A of least tr((error - B A) R (error - B A)^T), by least squares on R's symmetric root."""
    values, vectors = np.linalg.eigh(moments)
    root = vectors @ np.diag(np.sqrt(np.clip(values, 0, None))) @ vectors.T
    B = np.linalg.lstsq((A @ root).T, (error @ root).T, rcond=None)[0].T
    return error - B @ A
