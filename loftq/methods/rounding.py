"""Rounding that looks at the inputs: scales searched per block, and codes chosen one column after the other.

Scale search. A block's scale is usually its largest magnitude, which is the best choice for none but the largest
value. For each block, scales (and shifts) are tried on a grid below and above that, fitted by weighted least
squares to the codes that they give, and the one is taken that leaves the least sum of h_j (w_j - q_j)^2, with h
the inputs' mean squares (1 without statistics). Codes and scale are then refitted in turns, as in Lloyd's method.

Error feedback (GPTQ: Frantar et al. 2022, arXiv 2210.17323; as LDLQ: Chee et al. 2023, arXiv 2307.13304). With
R = U D U^T, U unit upper triangular, the error E = W - Q costs tr(E R E^T) = ||E U D^1/2||^2, and column k of E U is
e_k + sum over j < k of e_j U_jk. So rounding column k of

    w_k + sum over j < k of e_j U_jk

leaves there no more than its own rounding, times D_kk, which is the conditional variance of input k given the later
ones. Here the scales are fixed beforehand, as stored, and any table of levels will do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qlora_kit.codecs.blockwise import nearest_codes, search_codes
from qlora_kit.codecs.codebooks import is_rotated, scheme
from qlora_kit.codecs.quantized import Quantized, Quantizer, Scales
from qlora_kit.lowrank import norm

from .metric import Metric
from .trellis import round_rotated

# Tried in the place of 1: the largest magnitude as the scale.
_GRID = tuple(0.30 + 0.05 * step for step in range(19))
# Where a smaller range lies in the block's: values need not be as many, nor matter as much, at both of its ends.
_PLACES = (0.0, 0.5, 1.0)
_REFITS = 3
# Weights that are searched at a time: the temporaries are a dozen as many floats.
_CHUNK = 1 << 20
# Columns after whose rounding the later ones are brought up to date by one product.
_BLOCK = 128


@torch.no_grad()
def round_by_search(matrix: Tensor, quantizer: Quantizer, metric: Metric) -> Quantized:
    """``matrix`` float32 (out, in) with the nearest codes to searched scales. int8 keeps its rows' magnitudes, and
    rotated types have scales of least error anyway."""
    if is_rotated(quantizer.quant_type):
        return quantizer(matrix)
    # Searched from the magnitudes themselves; the search's result is what goes through 8 bits.
    plain = replace(quantizer, double_quant=False)(matrix)
    if plain.blocksize is None:
        return plain
    importance = _importance(metric, matrix)
    scales, shifts = _searched(matrix, plain, importance)
    stored = Scales.of(scales, quantizer.double_quant)
    stored_shifts = None if shifts is None else Scales.of(shifts, quantizer.double_quant)
    read, read_shifts = stored.read(), None if stored_shifts is None else stored_shifts.read()
    codes = nearest_codes(matrix.reshape(-1), read, read_shifts, plain.table(), plain.blocksize, clamp=True)
    codes = codes.view(matrix.shape)
    found = Quantized(plain.quant_type, codes, stored, stored_shifts, plain.blocksize, None, plain.rows)
    if quantizer.double_quant:  # 8 bits may take more from the found scales than the search gave
        unsearched, weights = quantizer(matrix), importance.sqrt()
        lost, kept = (norm((matrix - one.dequantize()) * weights) for one in (found, unsearched))
        return found if lost <= kept else unsearched
    return found


@torch.no_grad()
def round_with_feedback(matrix: Tensor, quantizer: Quantizer, metric: Metric, *, search: bool = True) -> Quantized:
    """``matrix`` float32 (out, in) with codes that make up for one another under ``metric``.

    Args:
        search: search the scales; else they are the quantizer's own.
    """
    if is_rotated(quantizer.quant_type):
        return round_rotated(matrix, quantizer, metric)
    scaled = round_by_search(matrix, quantizer, metric) if search else quantizer(matrix)
    if metric.order is None:  # nothing is correlated: the nearest codes are the best
        return scaled
    assert metric.factor is not None
    out_features, width = matrix.shape
    levels, labels, midpoints = ascending(scaled)
    blocksize, scales, shifts = scaled.blocksize or width, scaled.scales, scaled.shifts
    first = torch.arange(out_features, device=matrix.device) * width
    # Columns as rows, in the triangle's order: what is worked on at a time then lies together.
    unit = metric.factor / metric.factor.diagonal()
    rest = matrix.T[metric.order].contiguous()
    codes = torch.empty(width, out_features, dtype=labels.dtype, device=rest.device)
    for begin in range(0, width, _BLOCK):
        part = rest[begin : begin + _BLOCK]
        errors = torch.empty_like(part)
        inner = unit[begin : begin + _BLOCK, begin : begin + _BLOCK]
        for k, column in enumerate(metric.order[begin : begin + _BLOCK].tolist()):
            block = torch.div(first + column, blocksize, rounding_mode="floor")
            scale = scales[block]
            shift = None if shifts is None else shifts[block]
            goal = part[k] if k == 0 else part[k] + inner[:k, k] @ errors[:k]
            value = goal if shift is None else goal - shift
            # A block of zeros has the scale 0 and any code reads as 0 there.
            rank = torch.bucketize(value / torch.where(scale == 0, torch.ones_like(scale), scale), midpoints)
            read = levels[rank] * scale
            errors[k] = matrix[:, column] - (read if shift is None else read + shift)
            codes[begin + k] = labels[rank]
        if begin + _BLOCK < width:
            rest[begin + _BLOCK :].addmm_(unit[begin : begin + _BLOCK, begin + _BLOCK :].T, errors)
    placed = torch.empty_like(codes)
    placed[metric.order] = codes
    return Quantized(
        scaled.quant_type,
        placed.T.contiguous(),
        scaled.stored_scales,
        scaled.stored_shifts,
        scaled.blocksize,
        None,
        scaled.rows,
    )


def ascending(quantized: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """What codes read as before scaling, ascending; the codes, uint8 or int8; and the midpoints between levels. Not of
    rotated types: no value of these is a code's alone."""
    assert not is_rotated(quantized.quant_type)
    if quantized.blocksize is None:
        codes = torch.arange(-127, 128, device=quantized.codes.device)
        levels, labels = codes / 127.0, codes.to(torch.int8)
    else:
        levels, order = quantized.table().sort(stable=True)
        labels = order.to(torch.uint8)
    return levels, labels, (levels[:-1] + levels[1:]) / 2


def _importance(metric: Metric, matrix: Tensor) -> Tensor:
    """The inputs' damped mean squares, (in,)."""
    if metric.factor is None:
        return torch.ones(matrix.shape[1], device=matrix.device)
    if metric.order is None:
        return metric.factor.square()
    squares = torch.empty_like(metric.factor[0])
    squares[metric.order] = metric.factor.square().sum(dim=1)
    return squares


def _searched(matrix: Tensor, plain: Quantized, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and shifts of least weighted squared error, float32 (blocks,)."""
    assert plain.blocksize is not None
    size, count = plain.blocksize, matrix.numel()
    kind = scheme(plain.quant_type).scaling
    table = plain.table()
    scales = plain.scales.clone()
    shifts = None if plain.shifts is None else plain.shifts.clone()
    flat, width = matrix.reshape(-1), matrix.shape[1]
    step = max(1, _CHUNK // size)
    for begin in range(0, len(scales), step):
        rows = slice(begin, min(begin + step, len(scales)))
        start, stop = begin * size, min(rows.stop * size, count)
        part = torch.zeros((rows.stop - begin) * size, device=flat.device)
        part[: stop - start] = flat[start:stop]
        weights = torch.zeros_like(part)
        weights[: stop - start] = importance[torch.arange(start, stop, device=flat.device) % width]
        found = _best(
            part.view(-1, size),
            weights.view(-1, size),
            scales[rows],
            None if shifts is None else shifts[rows],
            table,
            kind,
        )
        scales[rows] = found[0]
        if shifts is not None:
            shifts[rows] = found[1]
    return scales, shifts


def _best(
    part: Tensor, weights: Tensor, scales: Tensor, shifts: Tensor | None, table: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """The search on whole blocks (blocks, size)."""
    # In units of the block's own scale, so that no square leaves float32's range.
    unit = torch.where(scales == 0, torch.ones_like(scales), scales)
    origin = torch.zeros_like(scales) if shifts is None else shifts
    part = (part - origin[:, None]) / unit[:, None]
    weights = weights / weights.amax(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)
    best = torch.ones_like(scales), torch.zeros_like(scales)
    least = torch.full_like(scales, torch.inf)

    def consider(scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal best, least
        read = table[search_codes(((part - shift[:, None]) / scale[:, None]).clamp_(-1, 1).view(-1), table).int()]
        read = read.view_as(part)
        if shifts is None:
            weighed = weights * read
            fitted = (weighed * part).sum(1) / (weighed * read).sum(1).clamp_min(1e-30)
            moved = shift
        else:
            # About the means: where few inputs matter, differences of the sums would be rounding alone.
            total = weights.sum(1)
            level, value = (weights * read).sum(1) / total, (weights * part).sum(1) / total
            centred = read - level[:, None]
            weighed = weights * centred
            fitted = (weighed * (part - value[:, None])).sum(1) / (weighed * centred).sum(1).clamp_min(1e-30)
            moved = value - fitted * level
        # Codes that all read as 0, or as one level, say nothing of the scale.
        told = fitted.isfinite() & moved.isfinite() & (fitted.abs() > 1e-6)
        fitted, moved = torch.where(told, fitted, scale), torch.where(told, moved, shift)
        error = (weights * (fitted[:, None] * read + moved[:, None] - part).square()).sum(1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, fitted, best[0]), torch.where(better, moved, best[1])
        return best

    zero = torch.zeros_like(scales)
    for multiplier in _GRID:
        size = torch.full_like(scales, multiplier)
        if shifts is not None:
            for place in _PLACES:
                consider(size, (1 - size) * place)
        else:
            consider(size, zero)
            if kind == "signed":
                consider(-size, zero)
    for _ in range(_REFITS):
        consider(*best)
    # A block of equal values has the scale 0, and is met by it: a table without a 0 has nothing as near.
    return torch.where(scales == 0, scales, best[0] * unit), torch.where(scales == 0, origin, best[1] * unit + origin)
