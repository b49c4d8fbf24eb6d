"""A merge in float64 numpy: what each storage makes of the ideal weight, and the report's numbers by definition."""

from __future__ import annotations

import numpy as np

from .loftq import round_rows_int8
from .quantization import float4, nearest_error, normal_float

SIGNIFICANT_BITS = {"float32": 24, "bfloat16": 8, "float16": 11}


def round_to_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """To the nearest float of ``bits`` significant bits, ties to even; neither overflow nor subnormals."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.rint(np.ldexp(mantissa, bits)), exponent - bits)


def rounding_norm(ideal: np.ndarray, storage: str) -> float:
    """||stored - ideal|| of a storage without doubly quantized scales, blocks of 64."""
    if storage in SIGNIFICANT_BITS:
        return float(np.linalg.norm(round_to_bits(ideal, SIGNIFICANT_BITS[storage]) - ideal))
    if storage == "int8":
        return float(np.linalg.norm(round_rows_int8(ideal) - ideal))
    levels = float4() if storage.startswith("fp4") else normal_float(3 if "nf3" in storage else 4)
    return float(np.linalg.norm(nearest_error(ideal, levels, 64)))


def fidelity(base: np.ndarray, delta: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    """The numbers of one layer, entry by entry."""
    base2 = ideal2 = delta2 = kept = lost2 = 0.0
    for w, d, s in zip(base.flat, delta.flat, stored.flat, strict=True):
        base2 += w * w
        delta2 += d * d
        ideal2 += (w + d) ** 2
        kept += (s - w) * d
        lost2 += (s - w - d) ** 2
    return {
        "delta_ratio": (delta2 / base2) ** 0.5,
        "retained": kept / delta2,
        "error": (lost2 / ideal2) ** 0.5,
        "delta_error": (lost2 / delta2) ** 0.5,
    }


def least_left(matrix: np.ndarray, rank: int) -> float:
    """What the best approximation of that rank leaves of ``matrix`` (Eckart and Young 1936): the root of the sum of the
    least eigenvalues of the smaller Gram matrix."""
    wide = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
    values = np.linalg.eigvalsh(wide @ wide.T)
    return float(np.sqrt(max(0.0, values[: max(0, len(values) - rank)].sum())))
