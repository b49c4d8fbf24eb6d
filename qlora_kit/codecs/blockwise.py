"""Blockwise table quantization in plain torch: the arithmetic that a kernel hides, readable and exact.

A weight is cut into runs of ``blocksize`` consecutive values (row-major). Each block keeps one scale, its
largest magnitude, and each value keeps the index of the table entry nearest to value / scale. Reading is a
table look-up times the scale; finding the nearest entry is a binary search over the midpoints of the sorted
table. A value exactly on a midpoint takes the lower entry, which is what bitsandbytes does: the codes of NF4
and FP4 here equal its codes, ties and all-zero blocks included.

Tables, all scaled to [-1, 1]:

- ``nf2``, ``nf3``, ``nf4``: quantiles of a normal distribution, NormalFloat (Dettmers et al. 2023, QLoRA,
  arXiv 2305.14314, appendix E, and bitsandbytes' ``create_normal_map``). With p = 0.9677083 and b bits:
  positives ppf(linspace(p, 0.5, 2^(b-1) + 1)[:-1]), negatives -ppf(linspace(p, 0.5, 2^(b-1))[:-1]), and zero,
  divided by the largest. The paper's 4 bits are the case b = 4; 2 and 3 follow the same recipe.
- ``fp4``: 1 sign, 2 exponent and 1 mantissa bit in bitsandbytes' bit patterns (``get_4bit_type``), which are
  not in order of value.
- ``uniform2`` ... ``uniform8``: 2^b equally spaced levels from -1 to 1.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..errors import CodecError

# fmt: off
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_NF3 = (
    -1.0, -0.4786291718482971, -0.21714182198047638, 0.0,
    0.16093020141124725, 0.33791524171829224, 0.5626170039176941, 1.0,
)
_NF2 = (-1.0, 0.0, 0.33791524171829224, 1.0)
_FP4_MAGNITUDES = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = tuple(sign * value / 12.0 for sign in (1.0, -1.0) for value in _FP4_MAGNITUDES)
# fmt: on

CODEBOOKS: dict[str, tuple[float, ...]] = {
    "nf2": _NF2,
    "nf3": _NF3,
    "nf4": _NF4,
    "fp4": _FP4,
    **{f"uniform{bits}": tuple(2 * i / (2**bits - 1) - 1 for i in range(2**bits)) for bits in range(2, 9)},
}


def codebook(quant_type: str, device: torch.device | str | None = None) -> Tensor:
    """The table of ``quant_type``: float32, (2^bits,), indexed by code.

    Raises:
        CodecError: no table has that name; lists those that do.
    """
    if quant_type not in CODEBOOKS:
        raise CodecError(f"quant_type: expected one of {sorted(CODEBOOKS)}, found {quant_type!r}")
    return torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32, device=device)


@cache
def _ranks(levels: tuple[float, ...]) -> tuple[int, ...]:
    """The codes in order of their value."""
    return tuple(torch.tensor(levels).argsort().tolist())


def quantize(weight: Tensor, table: Tensor, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """The nearest codes and the scales of ``weight``.

    Args:
        weight: any shape, finite, any floating dtype; quantized in float32.
        table: (levels,) float32 with levels <= 256 and entries in [-1, 1], in any order.
        blocksize: values per scale; the last block may be shorter.

    Returns:
        ``codes`` uint8 of ``weight``'s shape, and ``absmax`` float32 of (ceil(numel / blocksize),).
    """
    flat = weight.detach().reshape(-1).float()
    tail = flat.numel() % blocksize
    full = flat[: flat.numel() - tail].reshape(-1, blocksize)
    absmax = full.abs().amax(dim=1)
    # bitsandbytes multiplies whole blocks by a reciprocal and divides the short one: near a midpoint the two
    # round differently, and codes are to agree exactly. An all-zero block must not divide by zero.
    scaled = (full * (1.0 / absmax.clamp(min=1e-38))[:, None]).reshape(-1)
    if tail:
        last = flat[-tail:].abs().amax()
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, flat[-tail:] / last.clamp(min=1e-38)])
    order = torch.tensor(_ranks(tuple(table.tolist())), device=table.device)
    ascending = table[order]
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    ranks = torch.bucketize(scaled, midpoints, out_int32=True)
    return order.to(torch.uint8).index_select(0, ranks).reshape(weight.shape), absmax


def dequantize(codes: Tensor, table: Tensor, absmax: Tensor, blocksize: int = 64) -> Tensor:
    """``table[codes]`` times each block's scale: float32 of ``codes``' shape."""
    values = table.float().index_select(0, codes.reshape(-1).int())
    return scale_blocks_(values, absmax, blocksize).reshape(codes.shape)


def scale_blocks_(values: Tensor, absmax: Tensor, blocksize: int) -> Tensor:
    """Multiply flat ``values`` in place by their blocks' scales; returns them."""
    whole = values.numel() // blocksize
    values[: whole * blocksize].view(whole, blocksize).mul_(absmax[:whole, None])
    values[whole * blocksize :].mul_(absmax[whole:])
    return values
