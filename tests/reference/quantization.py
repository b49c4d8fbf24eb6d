"""Blockwise and int8 storage in float64 numpy, a value at a time: no table look-up, no shared arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import norm

P = 0.9677083  # the outermost quantile of NormalFloat


def normal_float(bits: int) -> np.ndarray:
    """NF levels, ascending, from the normal distribution's quantiles."""
    positive = [norm.ppf(p) for p in np.linspace(P, 0.5, 2 ** (bits - 1) + 1)[:-1]]
    negative = [-norm.ppf(p) for p in np.linspace(P, 0.5, 2 ** (bits - 1))[:-1]]
    levels = np.array(sorted([*positive, 0.0, *negative]))
    return levels / np.abs(levels).max()


def float4() -> np.ndarray:
    """FP4 levels by bit pattern: 3 bits of magnitude in twelfths, the fourth the sign."""
    magnitudes = {0: 0, 1: 1 / 16, 2: 8, 3: 12, 4: 4, 5: 6, 6: 2, 7: 3}
    return np.array([(-1 if code & 8 else 1) * magnitudes[code & 7] / 12 for code in range(16)])


def nearest_error(values: np.ndarray, levels: np.ndarray, blocksize: int) -> np.ndarray:
    """Each value's distance to the nearest reachable one, brute force, with its block's largest as the scale."""
    flat = values.reshape(-1).astype(np.float64)
    out = np.empty_like(flat)
    for start in range(0, flat.size, blocksize):
        block = flat[start : start + blocksize]
        reachable = levels * np.abs(block).max()
        out[start : start + blocksize] = np.abs(block[:, None] - reachable[None]).min(axis=1)
    return out.reshape(values.shape)


def read_4bit(
    packed: np.ndarray, absmax: np.ndarray, levels: np.ndarray, blocksize: int, shape: tuple[int, int]
) -> np.ndarray:
    """Row-major codes, first value of a byte in its high nibble, scale of block i // blocksize."""
    out = np.empty(shape[0] * shape[1])
    for i in range(out.size):
        byte = int(packed[i // 2])
        code = byte // 16 if i % 2 == 0 else byte % 16
        out[i] = levels[code] * float(absmax[i // blocksize])
    return out.reshape(shape)


def scales_8bit(
    codes: np.ndarray, table: np.ndarray, inner: np.ndarray, offset: float, blocksize: int = 256
) -> np.ndarray:
    """Doubly quantized scales."""
    return np.array([table[c] * float(inner[i // blocksize]) + offset for i, c in enumerate(codes)])


def read_int8(codes: np.ndarray, row_scales: np.ndarray) -> np.ndarray:
    return codes.astype(np.float64) * row_scales.astype(np.float64)[:, None] / 127


def read_linear4bit(module: Any) -> np.ndarray:
    """The (out, in) weight of a bitsandbytes ``Linear4bit`` in the standard layout, doubly quantized or not."""
    state = module.weight.quant_state
    levels = normal_float(4) if state.quant_type == "nf4" else float4()
    absmax = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        absmax = scales_8bit(absmax, inner.code.numpy(), inner.absmax.numpy(), state.offset.item())
    packed = module.weight.data.view(torch.uint8).reshape(-1).numpy()
    return read_4bit(packed, absmax, levels, state.blocksize, tuple(state.shape))
