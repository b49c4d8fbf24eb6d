"""Blockwise and int8 storage in float64 numpy, a value at a time: no table look-up, no shared arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.stats import norm

from . import trellis

P = 0.9677083  # the outermost quantile of NormalFloat
BINS = 40_000  # of the interval from -1 to 1; wide ones would stop Lloyd's iteration early


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


def block_scales(block: np.ndarray, scaling: str) -> tuple[float, float]:
    """Scale and shift of one block: "absmax", "signed" (the positive of two equally far ends) or "range"."""
    if scaling == "range":
        return max(block) - min(block), min(block)
    far = max(block, key=lambda value: (abs(value), value))
    return (far if scaling == "signed" else abs(far)), 0.0


def round_blocks(
    values: np.ndarray, levels: np.ndarray, blocksize: int, scaling: str, multipliers: tuple[float, ...] = (1.0,)
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brute force: what each value reads as, its code, and by how much another level would have been worse.

    Each block takes the multiplier of its scale that leaves the least squared error. The third array is
    relative to the block's largest magnitude: where it is 0, two levels are equally near.
    """
    flat = values.reshape(-1).astype(np.float64)
    read, codes, lead = np.empty_like(flat), np.empty(flat.size, dtype=np.int64), np.empty_like(flat)
    for start in range(0, flat.size, blocksize):
        block, least = flat[start : start + blocksize], np.inf
        scale, shift = block_scales(block, scaling)
        for multiplier in multipliers:
            reachable = levels * (scale * multiplier) + shift
            distances = np.abs(block[:, None] - reachable[None, :])
            error = (distances.min(axis=1) ** 2).sum()
            if error < least:
                least, here = error, slice(start, start + len(block))
                codes[here] = distances.argmin(axis=1)
                read[here] = reachable[codes[here]]
                first, second = np.sort(distances, axis=1)[:, :2].T
                lead[here] = (second - first) / max(np.abs(block).max(), 1e-300)
    return read.reshape(values.shape), codes.reshape(values.shape), lead.reshape(values.shape)


def normal_sample(blocksize: int, scaling: str, values: int = 4_000_000) -> tuple[np.ndarray, np.ndarray]:
    """Normal values over their blocks' scales, in narrow bins: the bins' means, and their weights.

    A value weighs its block's squared scale, as its error does in the end; together the weights are 1. Blocks
    and their negatives are equally likely, so "absmax" counts both.
    """
    blocks = np.random.default_rng(7).standard_normal((values // blocksize, blocksize), dtype=np.float32)
    largest = np.abs(blocks).max(axis=1)
    if scaling == "signed":
        highest = blocks.max(axis=1)
        largest = np.where(highest == largest, largest, -largest)
    normal = (blocks / largest[:, None]).astype(np.float64).ravel()
    weight = np.repeat(largest.astype(np.float64) ** 2, blocksize)
    where = np.minimum(((normal + 1) * BINS / 2).astype(np.int64), BINS - 1)
    mass, moment = np.bincount(where, weight, BINS), np.bincount(where, weight * normal, BINS)
    if scaling == "absmax":
        mass, moment = mass + mass[::-1], moment - moment[::-1]
    kept = mass > 0
    return moment[kept] / mass[kept], mass[kept] / mass.sum()


def expected_error(points: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> float:
    """The weighted mean of the squared distances to the nearest level."""
    return float(weights @ np.abs(points[:, None] - levels[None, :]).min(axis=1) ** 2)


def lloyd_max(points: np.ndarray, weights: np.ndarray, count: int, symmetric: bool) -> np.ndarray:
    """The best of Lloyd's iterations from several starts: points to the nearest level, levels to their means."""
    draw = np.random.default_rng(5)
    found = []
    for _ in range(4):
        levels = np.sort(draw.uniform(-0.9, 0.9, count))
        if symmetric:
            levels = (levels - levels[::-1]) / 2
        for _ in range(600):
            nearest = np.digitize(points, (levels[1:] + levels[:-1]) / 2)
            mass = np.bincount(nearest, weights, count)
            means = np.bincount(nearest, weights * points, count) / np.maximum(mass, 1e-300)
            step = np.abs(means - levels)[mass > 0].max()
            levels = np.where(mass > 0, means, levels)
            if step < 1e-6:
                break
        found.append((expected_error(points, weights, levels), levels))
    return min(found, key=lambda pair: pair[0])[1]


def pack_bits(codes: list[int], bits: int) -> bytes:
    """Bit b of code i is bit (i * bits + b) of the bytes, lowest first; the last group is filled with zeros."""
    group = {2: 8, 3: 24, 4: 8, 8: 8}[bits]
    size = -(-len(codes) * bits // group) * group // 8
    out = bytearray(size)
    for i, code in enumerate(codes):
        for b in range(bits):
            if code >> b & 1:
                place = i * bits + b
                out[place // 8] |= 1 << place % 8
    return bytes(out)


def unpack_bits(packed: bytes, bits: int, count: int) -> list[int]:
    """The first ``count`` codes of ``pack_bits``."""
    flags = [byte >> b & 1 for byte in packed for b in range(8)]
    return [sum(flags[i * bits + b] << b for b in range(bits)) for i in range(count)]


def dynamic_levels() -> np.ndarray:
    """The signed dynamic 8-bit type: in decade 10^-k, 2^(6-k) even steps from 0.1 to 1 have their middles, k = 0...6;
    with both signs, and 0 and 1."""
    positive = []
    for k in range(7):
        steps = 2 ** (6 - k)
        positive += [10.0**-k * (0.1 + 0.9 * (i + 0.5) / steps) for i in range(steps)]
    return np.array(sorted([0.0, 1.0, *positive, *(-value for value in positive)]))


def read_packed(module: Any, *, stored_basis: bool = False) -> np.ndarray:
    """The (out, in) weight of a packed linear, bit by bit; of a rotated type as it is stored if ``stored_basis``."""
    bits = int(module.quant_type[-1])
    shape = module.out_features, module.in_features
    count = shape[0] * shape[1]
    codes = unpack_bits(module.weight.data.numpy().tobytes(), bits, count)
    levels = module.codebook.double().numpy()
    memory = len(levels).bit_length() - 1
    if memory > bits:
        read = trellis.look_up(np.array(codes).reshape(shape), levels, bits).reshape(-1)
    else:
        read = np.array([levels[code] for code in codes])
    parts = {}
    for name in ("scales", "shifts"):
        stored = getattr(module, name, None)
        parts[name] = np.zeros(count) if stored is None else stored.numpy()
        if getattr(module, f"{name}_absmax", None) is not None:
            inner, offset = getattr(module, f"{name}_absmax").numpy(), getattr(module, f"{name}_offset").item()
            parts[name] = scales_8bit(parts[name], dynamic_levels(), inner, offset)
    blocks = np.arange(count) // module.blocksize
    values = (read * parts["scales"][blocks] + parts["shifts"][blocks]).reshape(shape)
    return values @ trellis.rotation(shape[1]) if module.rotated and not stored_basis else values
