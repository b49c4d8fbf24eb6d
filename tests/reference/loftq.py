"""LoftQ's alternation in float64 numpy, written from the paper: tables from their formula, nearest entry by
exhaustive search, decomposition by Jacobi rotations."""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from .lowrank import best_approximation


def normal_float(bits: int) -> np.ndarray:
    """NormalFloat's levels, ascending (Dettmers et al. 2023)."""
    p = 0.9677083
    positive = norm.ppf(np.linspace(p, 0.5, 2 ** (bits - 1) + 1)[:-1])
    negative = -norm.ppf(np.linspace(p, 0.5, 2 ** (bits - 1))[:-1])
    return np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()


def round_blocks(matrix: np.ndarray, bits: int, blocksize: int) -> np.ndarray:
    """Quantized and read back, block by block of the row-major values."""
    table, flat = normal_float(bits), matrix.reshape(-1).astype(np.float64)
    out = np.empty_like(flat)
    for begin in range(0, flat.size, blocksize):
        block = flat[begin : begin + blocksize]
        scale = np.abs(block).max()
        for i, value in enumerate(block):
            nearest = np.argmin(np.abs(table - value / scale)) if scale else np.argmin(np.abs(table))
            out[begin + i] = table[nearest] * scale
    return out.reshape(matrix.shape)


def round_rows_int8(matrix: np.ndarray) -> np.ndarray:
    """Each row to 255 even levels up to its largest magnitude, from float16 values.

    With 11 significant bits a value often lies midway between two levels, and the rounding of 127 / scale then
    decides: torch, and so bitsandbytes, computes it as 127 times the reciprocal in float32.
    """
    half = matrix.astype(np.float16).astype(np.float64)
    scale = np.abs(half).max(axis=1, keepdims=True)
    safe = np.where(scale > 0, scale, 1.0)
    inverse = np.float32(127.0) * (np.float32(1.0) / safe.astype(np.float32))
    return np.rint(half.astype(np.float32) * inverse) * safe / 127.0


def alternate(
    weight: np.ndarray, rank: int, *, bits: int, steps: int, blocksize: int = 64
) -> tuple[list[float], list[np.ndarray], list[np.ndarray]]:
    """(relative error, Q, low-rank product) of every one of ``steps`` steps, none left out."""
    weight = weight.astype(np.float64)
    product = np.zeros_like(weight)
    errors, quantized, products = [], [], []
    for _ in range(steps):
        target = weight - product
        q = round_rows_int8(target) if bits == 8 else round_blocks(target, bits, blocksize)
        product = best_approximation(weight - q, rank)
        errors.append(float(np.linalg.norm(weight - q - product) / np.linalg.norm(weight)))
        quantized.append(q)
        products.append(product)
    return errors, quantized, products
