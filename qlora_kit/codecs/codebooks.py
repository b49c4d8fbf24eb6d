"""The tables of low-bit types: what values a block's codes stand for, and what its scale is.

A type is a table of 2^bits levels and a way to bring a block into the table's range:

- ``absmax``: the scale is the block's largest magnitude, so values lie in [-1, 1] and one of them is 1 or -1;
- ``signed``: the scale is the value of largest magnitude with its sign, so one value is always 1 and never -1;
  a table can spend a level on it and put the others where the rest of the block is;
- ``range``: a shift besides the scale brings the block's least value to 0 and its largest to 1;
- ``fitted``: the scale is the one of least squared error, a row's each, after the row has been rotated (``trellis``).

Types:

- ``nf2``, ``nf3``, ``nf4``: quantiles of a normal distribution, NormalFloat (Dettmers et al. 2023, QLoRA,
  arXiv 2305.14314, appendix E, and bitsandbytes' ``create_normal_map``). With p = 0.9677083 and b bits:
  positives ppf(linspace(p, 0.5, 2^(b-1) + 1)[:-1]), negatives -ppf(linspace(p, 0.5, 2^(b-1))[:-1]), and zero,
  divided by the largest. The paper's 4 bits are the case b = 4; 2 and 3 follow the same recipe.
- ``fp4``: 1 sign, 2 exponent and 1 mantissa bit in bitsandbytes' bit patterns (``get_4bit_type``), which are
  not in order of value.
- ``uniform2`` ... ``uniform8``: 2^b equally spaced levels from -1 to 1.
- ``affine2`` ... ``affine8``: 2^b equally spaced levels from the block's least to its largest value.
- ``lloyd2``, ``lloyd3``: the levels of least squared error (Lloyd 1982, Max 1960) for blocks of independent
  normal values divided by their largest magnitude, symmetric about 0; they depend on the blocksize.
- ``signed2``, ``signed3``: the same for ``signed`` scales, which makes them lopsided.
- ``rotated2``, ``rotated3``, ``rotated4``: the same for rotated rows, which are like normal values themselves.
- ``trellis2``, ``trellis3``, ``trellis4``: rotated rows whose codes have values by the codes before them too; a table
  then has 2^memory levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..errors import CodecError, closest
from .trellis.tables import TABLES

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
# Lloyd (1982) and Max (1960): the levels of least squared error for a normal value, to four digits.
_NORMAL = {
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
# Fitted levels are rounded to this, so that no library's last digits change a stored model.
_FITTED_DIGITS = 3


@dataclass(frozen=True)
class Scheme:
    """A low-bit type: ``bits`` a code, ``scaling`` "absmax", "signed", "range" or "fitted", levels None if they depend
    on the blocksize."""

    name: str
    bits: int
    scaling: str
    levels: tuple[float, ...] | None = None

    @property
    def rotated(self) -> bool:
        """Whether codes are those of rotated rows (``trellis``), and scales are of rows."""
        return self.scaling == "fitted"

    @property
    def memory(self) -> int:
        """Bits of a row's codes that a value depends on: those of its own code, or more."""
        return self.bits if self.levels is None else len(self.levels).bit_length() - 1

    def blocksize(self, asked: int | None, width: int) -> int:
        """Values that share a scale in rows of ``width``, where ``asked`` (None for rows) are asked for."""
        return max(1, width) if self.rotated else asked or max(1, width)

    def table(self, blocksize: int = 64) -> tuple[float, ...]:
        """The 2^memory levels, by the number that ``memory`` bits are."""
        return self.levels or _fitted_levels(self.bits, self.scaling, blocksize)

    def multipliers(self, blocksize: int = 64) -> tuple[float, ...]:
        """What a block's largest magnitude may be multiplied by to give its scale.

        A fitted table stays short of its block's largest value. Where that is to be met exactly, as in a block
        that was quantized before, the scale is larger by as much; else requantizing would shrink a weight.
        """
        return (1.0,) if self.levels else (1.0, 1 / max(self.table(blocksize)))


def _even(bits: int, least: float) -> tuple[float, ...]:
    top = 2**bits - 1
    return tuple(least + (1 - least) * code / top for code in range(top + 1))


def _both_signs(half: tuple[float, ...]) -> tuple[float, ...]:
    return (*(-value for value in reversed(half)), *half)


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in [
        Scheme("nf2", 2, "absmax", _NF2),
        Scheme("nf3", 3, "absmax", _NF3),
        Scheme("nf4", 4, "absmax", _NF4),
        Scheme("fp4", 4, "absmax", _FP4),
        *(Scheme(f"uniform{bits}", bits, "absmax", _even(bits, -1.0)) for bits in range(2, 9)),
        *(Scheme(f"affine{bits}", bits, "range", _even(bits, 0.0)) for bits in range(2, 9)),
        *(Scheme(f"lloyd{bits}", bits, "absmax") for bits in (2, 3)),
        *(Scheme(f"signed{bits}", bits, "signed") for bits in (2, 3)),
        *(Scheme(f"rotated{bits}", bits, "fitted", _both_signs(half)) for bits, half in _NORMAL.items()),
        *(Scheme(f"trellis{bits}", bits, "fitted", levels) for bits, levels in TABLES.items()),
    ]
}
# All types there are; bitsandbytes' int8 has whole rows in the place of blocks, and no table.
TYPES = (*SCHEMES, "int8")
# Those that modules store: codes of other numbers of bits aren't packed, only computed with.
STORED_TYPES = tuple(name for name in TYPES if name == "int8" or SCHEMES[name].bits in (2, 3, 4, 8))


def scheme(quant_type: str) -> Scheme:
    """The scheme of that name.

    Raises:
        CodecError: there is none; lists the known.
    """
    if quant_type not in SCHEMES:
        raise CodecError(
            f"quant_type: expected one of {sorted(SCHEMES)}, found {quant_type!r}; "
            f"the closest are {closest(str(quant_type), SCHEMES)}"
        )
    return SCHEMES[quant_type]


def is_rotated(quant_type: str) -> bool:
    """Whether that type, "int8" among them, has the codes of rotated rows.

    Raises:
        CodecError: there is none; lists the known.
    """
    return quant_type != "int8" and scheme(quant_type).rotated


def codebook(quant_type: str, device: torch.device | str | None = None, blocksize: int = 64) -> Tensor:
    """The table of ``quant_type``: float32, (2^memory,), indexed by code. Some depend on ``blocksize``.

    Raises:
        CodecError: no table has that name; lists those that do.
    """
    return torch.tensor(scheme(quant_type).table(blocksize), dtype=torch.float32, device=device)


@cache
def _fitted_levels(bits: int, scaling: str, blocksize: int) -> tuple[float, ...]:
    """Lloyd-Max levels for blocks of ``blocksize`` normal values over their largest: the least expected squared
    error of the values, which weighs a normalized error by its block's squared scale."""
    if blocksize < 2:
        return (-1.0, *[0.0] * (2**bits - 2), 1.0)
    points, weights = _normalized_density(blocksize)
    ends = np.array([weights[-1], weights[-1]]) if scaling == "absmax" else np.array([0.0, 2 * weights[-1]])
    weights = np.concatenate([ends[:1], weights[:-1], ends[1:]])
    points = np.concatenate([[-1.0], points, [1.0]])
    best, least = None, np.inf
    # Two starts, spread over all values or with the top level on the largest: Lloyd's steps find local optima.
    for start in (np.linspace(-0.8, 0.8, 2**bits), np.append(np.linspace(-0.7, 0.6, 2**bits - 1), 1.0)):
        levels = _lloyd(points, weights, start)
        if scaling == "absmax":
            levels = (levels - levels[::-1]) / 2
        error = (weights * np.abs(points[:, None] - levels).min(axis=1) ** 2).sum()
        if error < least - 1e-9:
            best, least = levels, error
    assert best is not None
    return tuple(round(float(level), _FITTED_DIGITS) for level in best)


def _normalized_density(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Points in (-1, 1) and their weights, and last the weight of one end: x / M for n normal values whose
    largest magnitude is M, weighted by M^2.

    M has density n c(m)^(n-1) 2 phi(m) with c(m) = 2 Phi(m) - 1, and given M the other n - 1 values are normal
    values cut off at it.
    """
    from scipy.special import ndtr

    def density(x: np.ndarray) -> np.ndarray:
        return np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)

    step = 1 / 1000
    points = (np.arange(-1000, 1000) + 0.5) * step
    m = np.linspace(0.0, 9.0, 1801)[1:]
    inside = 2 * ndtr(m) - 1
    largest = n * inside ** (n - 1) * 2 * density(m) * m**2
    others = density(points[:, None] * m) * m / inside
    weights = (n - 1) * step * (others * largest).sum(axis=1)
    return points, np.append(weights, largest.sum() / 2)


def _lloyd(points: np.ndarray, weights: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Levels at the weighted means of the points nearest to them, iterated to rest; ``points`` ascend."""
    mass, moment = np.cumsum(weights), np.cumsum(weights * points)
    for _ in range(2000):
        cuts = np.searchsorted(points, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], cuts, [len(points)]])
        below = np.concatenate([[0.0], mass])[edges], np.concatenate([[0.0], moment])[edges]
        share = np.diff(below[0])
        moved = np.where(share > 0, np.diff(below[1]) / np.where(share > 0, share, 1), levels)
        if np.abs(moved - levels).max() < 1e-7:
            break
        levels = moved
    return levels
