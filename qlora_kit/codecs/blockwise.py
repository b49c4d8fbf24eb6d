"""Blockwise table quantization in plain torch: the arithmetic that a kernel hides, readable and exact.

A weight is cut into runs of ``blocksize`` consecutive values (row-major). Each block keeps a scale (and, for
ranges, a shift), and each value keeps the index of the table entry nearest to (value - shift) / scale. Reading
is a table look-up times the scale plus the shift. A value exactly between two entries takes the lower, which is
what bitsandbytes does: the codes of NF4 and FP4 here equal its codes, ties and all-zero blocks included.

Finding the nearest entry. A binary search over the midpoints of the sorted table is exact but costs a dozen
mispredicted branches a value. Here [-1, 1] is cut into equal bins so narrow that each has at most one midpoint
in or beside it. A value's bin then gives the number of midpoints below it up to one comparison, and both come
from tables that stay in the first-level cache. The work runs over chunks that stay in the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import CodecError
from ..kernels.reading import scale_blocks_
from .finite import all_finite

# Values that are looked up at a time on a CPU: their temporaries together fill a few MB.
_CHUNK = 1 << 18
# More bins than this would leave the first-level cache, and the binary search takes over.
_MOST_BINS = 2048
# Levels up to which a table of all pairs of codes stays in the first-level cache.
_MOST_PAIRED = 16


def quantize(
    weight: Tensor,
    table: Tensor,
    blocksize: int = 64,
    *,
    signed: bool = False,
    multipliers: tuple[float, ...] = (1.0,),
) -> tuple[Tensor, Tensor]:
    """The nearest codes and the scales of ``weight``.

    Args:
        weight: any shape, finite, any floating dtype; quantized in float32.
        table: (levels,) float32 with levels <= 256 and entries in [-1, 1], in any order.
        blocksize: values per scale; the last block may be shorter.
        signed: give the scale the sign of the value that it is the magnitude of (of the positive one where
            both ends are equally far).
        multipliers: the scale is the largest magnitude times one of these, each at least 1; for each block the
            one that leaves the least squared error.

    Returns:
        ``codes`` uint8 of ``weight``'s shape, and scales float32 of (ceil(numel / blocksize),).

    Raises:
        CodecError: a value is NaN or infinite.
    """
    flat = weight.detach().reshape(-1).float()
    highest, lowest = _extremes(flat, blocksize)
    absmax = torch.maximum(highest, -lowest)
    if not all_finite(absmax):
        raise CodecError(
            "weight: expected values that are finite in torch.float32, found NaN or infinity; load the weight again "
            "or leave the module out of the targets"
        )
    scales = torch.where(-lowest > highest, -absmax, absmax) if signed else absmax
    scales = _best_scales(flat, scales, table, blocksize, multipliers)
    return nearest_codes(flat, scales, None, table, blocksize).reshape(weight.shape), scales


def quantize_range(weight: Tensor, table: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and shifts of ``weight`` with each block's range brought to [0, 1]; see ``quantize``.

    Raises:
        CodecError: a block's range overflows float32.
    """
    flat = weight.detach().reshape(-1).float()
    highest, lowest = _extremes(flat, blocksize)
    scales = highest - lowest
    if not scales.isfinite().all():
        raise CodecError(
            f"weight: expected blocks whose range float32 can hold, found one from {lowest.min():.4g} to "
            f"{highest.max():.4g}; scale the weight down, or use a type without a range"
        )
    return nearest_codes(flat, scales, lowest, table, blocksize).reshape(weight.shape), scales, lowest


def nearest_codes(
    flat: Tensor, scales: Tensor, shifts: Tensor | None, table: Tensor, blocksize: int, *, clamp: bool = False
) -> Tensor:
    """uint8 codes of the entries nearest to (value - shift) / scale, for flat float32 values.

    ``clamp`` is for scales that don't reach over their blocks: what lies beyond takes the table's end.
    """
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the short one: near a midpoint the two
    # round differently, and codes are to agree exactly.
    safe = _off_zero(scales)
    inverse = 1.0 / safe
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    levels = tuple(table.tolist())
    whole = flat.numel() // blocksize
    for rows in _chunks(whole, blocksize, flat.device):
        part = flat[rows.start * blocksize : rows.stop * blocksize].view(-1, blocksize)
        part = part - shifts[rows, None] if shifts is not None else part
        part = (part * inverse[rows, None]).view(-1)
        codes[rows.start * blocksize : rows.stop * blocksize] = _search(part.clamp_(-1, 1) if clamp else part, levels)
    if whole * blocksize < flat.numel():
        tail = flat[whole * blocksize :]
        tail = tail - shifts[whole:] if shifts is not None else tail
        tail = tail / safe[whole:]
        codes[whole * blocksize :] = _search(tail.clamp_(-1, 1) if clamp else tail, levels)
    return codes


def search_codes(values: Tensor, table: Tensor) -> Tensor:
    """The uint8 codes of ``table``'s entries nearest to flat float32 ``values``, which lie in [-1, 1]."""
    return _search(values, tuple(table.tolist()))


def dequantize(
    codes: Tensor,
    table: Tensor,
    scales: Tensor,
    blocksize: int = 64,
    shifts: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``table[codes]`` times each block's scale, plus its shift: float32 of ``codes``' shape.

    ``out``, contiguous float32 of that shape, is overwritten: fresh memory costs more than the arithmetic.
    """
    flat, table = codes.reshape(-1).contiguous(), table.float()
    values = torch.empty(flat.numel(), device=flat.device, dtype=torch.float32) if out is None else out.view(-1)
    paired = flat.device.type == "cpu" and table.numel() <= _MOST_PAIRED
    paired = paired and flat.storage_offset() % 2 == values.storage_offset() % 2 == 0  # pairs are read as one number
    whole = flat.numel() // 2 * 2 if paired else 0
    if whole:  # two codes at a time are one number, and two values one: half as many look-ups
        numbers, doubles, by_number = flat[:whole].view(torch.int16), values[:whole].view(torch.int64), _in_pairs(table)
        for part in _chunks(whole // 2, 1, flat.device):
            torch.index_select(by_number, 0, numbers[part].int(), out=doubles[part])
    torch.index_select(table, 0, flat[whole:].int(), out=values[whole:])
    return scale_blocks_(values, scales, blocksize, shifts).reshape(codes.shape)


def _in_pairs(table: Tensor) -> Tensor:
    """The bits of two values by the number that two uint8 codes beside each other are on this machine."""
    codes = torch.arange(table.numel(), dtype=torch.uint8)
    both = torch.cartesian_prod(codes, codes)
    numbers = both.view(torch.int16).reshape(-1).int()
    values = torch.zeros(int(numbers.max()) + 1, 2)
    values[numbers] = table[both.int()]
    return values.view(torch.int64).reshape(-1)


def _best_scales(flat: Tensor, scales: Tensor, table: Tensor, blocksize: int, multipliers: tuple[float, ...]) -> Tensor:
    """Each block's scale times the multiplier that leaves the least squared error, the earlier of equals."""
    if len(multipliers) == 1:
        return scales * multipliers[0] if multipliers[0] != 1.0 else scales
    levels, chosen = tuple(table.tolist()), torch.empty_like(scales)
    safe = _off_zero(scales)
    for rows in _chunks(scales.numel(), blocksize, flat.device):
        part = flat[rows.start * blocksize : rows.stop * blocksize]
        # Relative to the scale: squares of a whole weight's smallest or largest values leave float32's range.
        count = len(part)
        part = F.pad(part, (0, -count % blocksize)).view(-1, blocksize) * (1.0 / safe[rows, None])
        least = None
        for multiplier in multipliers:
            codes = _search((part / multiplier).view(-1), levels)
            values = table.index_select(0, codes.int()).view_as(part)
            error = values.mul_(multiplier).sub_(part).square_()
            error.view(-1)[count:] = 0  # what fills the last block up
            error = error.sum(dim=1)
            if least is None:
                chosen[rows], least = scales[rows] * multiplier, error
            else:
                chosen[rows] = torch.where(error < least, scales[rows] * multiplier, chosen[rows])
                least = torch.minimum(error, least)
    return chosen


def _off_zero(scales: Tensor) -> Tensor:
    """``scales`` to divide by: those of all-zero blocks moved off 0, signs kept."""
    return torch.where(scales < 0, scales.clamp(max=-1e-38), scales.clamp(min=1e-38))


def _extremes(flat: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """Each block's largest and least value."""
    whole = flat.numel() // blocksize
    blocks, tail = flat[: whole * blocksize].view(whole, blocksize), flat[whole * blocksize :]
    highest, lowest = blocks.amax(dim=1), blocks.amin(dim=1)
    if tail.numel():
        highest = torch.cat([highest, tail.amax()[None]])
        lowest = torch.cat([lowest, tail.amin()[None]])
    return highest, lowest


def _chunks(blocks: int, blocksize: int, device: torch.device) -> Iterator[slice]:
    step = max(1, _CHUNK // blocksize) if device.type == "cpu" else max(blocks, 1)
    return (slice(start, min(start + step, blocks)) for start in range(0, blocks, step))


def _search(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """The uint8 codes of the levels nearest to flat ``values`` in [-1, 1]."""
    bins, below, edges, midpoints, order = _tables(levels, values.device)
    if bins == 0:
        ranks = torch.bucketize(values, midpoints, out_int32=True)
    else:
        cell = torch.add(bins + 0.5, values, alpha=bins).to(torch.int32)
        ranks = values > edges.index_select(0, cell)
        ranks = below.index_select(0, cell).add_(ranks)
    return ranks if order is None else order.index_select(0, ranks.int())


@cache
def _tables(levels: tuple[float, ...], device: torch.device) -> tuple[int, Tensor, Tensor, Tensor, Tensor | None]:
    """What ``_search`` looks up: bins to either side of 0 (0: too many), for each bin the midpoints surely below
    it and the one that may be in it, all midpoints, and the code of each rank (None where they are equal)."""
    table = torch.tensor(levels)
    ascending, order = table.sort(stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    codes = None if order.tolist() == list(range(len(levels))) else order.to(torch.uint8).to(device)
    # Equal levels have equal midpoints beside them: values never land between these.
    distinct = midpoints.unique()
    gap = distinct.diff().min().item() if len(distinct) > 1 else 1.0
    bins = max(8, int(3 / gap) + 1)
    if bins > _MOST_BINS or len(distinct) < len(midpoints):
        none = torch.empty(0, device=device)
        return 0, none, none, midpoints.to(device), codes
    # A bin's middle is (i - bins) / bins; rounding moves a value at most into the bin beside it.
    middles = (torch.arange(2 * bins + 2, dtype=torch.float64) - bins) / bins
    below = (middles[:, None] - 1 / bins > midpoints.double()).sum(dim=1)
    padded = torch.cat([midpoints, torch.tensor([torch.inf])])
    return bins, below.to(torch.uint8).to(device), padded[below].to(device), midpoints.to(device), codes
