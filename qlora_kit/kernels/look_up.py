"""From packed codes to table values: a whole group of codes is one number, and one look-up gives all its values.

On a CPU the values of a group, up to 16 bytes, are moved as one element of that size (two float32 are an int64, four a
complex128): torch looks single elements up four times faster than rows of a few.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

# bits -> bits of the numbers that are looked up, such numbers in a group of whole bytes, and its bytes.
_NUMBERS = {2: (8, 1, 1), 3: (12, 2, 3), 4: (8, 1, 1), 8: (8, 1, 1)}
# Bytes -> a dtype of that many.
_ELEMENTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
# Values at a time on a CPU: few enough to stay in a cache, and enough for calls to cost little beside the work.
CHUNK = 1 << 19


def chunks(count: int, multiple: int, device: torch.device) -> Iterator[slice]:
    """The first ``count`` values, ``CHUNK`` or so at a time on a CPU, each chunk from a multiple of ``multiple``."""
    step = max(1, CHUNK // multiple) * multiple if device.type == "cpu" else max(1, count)
    return (slice(begin, min(begin + step, count)) for begin in range(0, count, step))


def group_values(table: Tensor, bits: int, unit: int | None = None, *, keep: bool = True) -> Tensor:
    """(2^n, codes): the values of the codes in every number of n bits, from ``table`` (2^memory,): n is ``unit``, and
    what a value depends on before its own code (``window``), which is lower in the number.

    Args:
        unit: bits of the codes that are looked up at once; None is those of ``look_up_``.
        keep: remember it; the table must then have values that can be read.
    """
    unit = unit or _NUMBERS[bits][0]
    if keep and table.device.type == "cpu":
        return _kept_groups(tuple(table.tolist()), bits, unit, table.dtype)
    return _groups(table, bits, unit)


def _groups(table: Tensor, bits: int, unit: int) -> Tensor:
    memory = table.numel().bit_length() - 1
    number = torch.arange(2 ** (memory - bits + unit), device=table.device)
    return torch.stack([table[number >> place & 2**memory - 1] for place in range(0, unit, bits)], dim=1)


@lru_cache(maxsize=32)
def _kept_groups(levels: tuple[float, ...], bits: int, unit: int, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode
        return _groups(torch.tensor(levels, dtype=dtype, device="cpu"), bits, unit)


def look_up_(packed: Tensor, bits: int, groups: Tensor, out: Tensor) -> Tensor:
    """Overwrite flat ``out`` with the values of as many codes, the first ones in flat bytes; returns it.

    Args:
        groups: of ``group_values``, in the dtype of ``out``.
    """
    _, parts, size = _NUMBERS[bits]
    codes = parts * groups.shape[1]
    whole, rest = divmod(out.numel(), codes)
    _look_groups_up_(packed[: whole * size], bits, groups, out[: whole * codes] if rest else out)
    if rest:
        last = out.new_empty(codes)
        _look_groups_up_(packed[whole * size : (whole + 1) * size], bits, groups, last)
        out[whole * codes :] = last[:rest]
    return out


def _look_groups_up_(packed: Tensor, bits: int, groups: Tensor, out: Tensor) -> None:
    groups, places = as_elements(groups, out.view(-1, _NUMBERS[bits][1], groups.shape[1]))
    for part, number in enumerate(_numbers(packed, bits)):
        select_(groups, number, places[:, part])


def select_(groups: Tensor, number: Tensor, out: Tensor) -> None:
    """Overwrite ``out`` with the ``groups`` of these numbers; with gaps in it torch doesn't trace ``out=``."""
    if torch.compiler.is_compiling():
        out.copy_(groups.index_select(0, number))
    else:
        torch.index_select(groups, 0, number, out=out)


def _numbers(packed: Tensor, bits: int) -> tuple[Tensor, ...]:
    """The numbers that are looked up, int32; those of a group in turn."""
    if bits != 3:
        return (packed.int(),)
    number = words(packed, 3)
    return number & 0xFFF, number >> 12


def words(packed: Tensor, size: int) -> Tensor:
    """Each ``size`` (1 or 3) of flat bytes as one number, the first the lowest: int32."""
    if size == 1:
        return packed.int()
    first, middle, last = packed.view(-1, 3).t().to(torch.int32, memory_format=torch.contiguous_format)
    return torch.add(first, middle, alpha=1 << 8).add_(last, alpha=1 << 16)


def as_elements(groups: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Both with a whole group of values as one element, where there are such and memory lies right for them."""
    size = groups.shape[1] * groups.element_size()
    fits = groups.device.type == "cpu" and size in _ELEMENTS and not torch.compiler.is_compiling()
    if not fits or places.storage_offset() * places.element_size() % size:
        return groups, places
    return groups.view(_ELEMENTS[size]).squeeze(1), places.view(_ELEMENTS[size]).squeeze(2)
