"""From packed codes whose values depend on the codes before them too (``window``) to these values.

The bits of some codes, and of those before them that the first depends on, are one number, and one look-up gives the
values of all of them: at 2 bits and a memory of 8 a byte and 6 bits before it give four.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import window
from .look_up import as_elements, group_values, look_up_, select_, words

# bits -> bytes of a group, and the bits of its codes that are looked up at once: few enough for values in a cache.
_GROUPS = {2: (1, 8), 3: (3, 6), 4: (1, 8)}


class Windows:
    """What codes of ``bits`` in rows of ``width`` stand for, by ``table``, float32 (2^memory,).

    Args:
        keep: remember what is made for it; the table must then have values that can be read.
    """

    def __init__(self, table: Tensor, bits: int, width: int, *, keep: bool = True) -> None:
        self.table, self.bits, self.width = table, bits, width
        self.before = table.numel().bit_length() - 1 - bits  # bits before its own code that a value depends on
        size = _GROUPS[bits][0] if bits in _GROUPS else 1
        # Else bytes have codes of two rows, or a number would need bits of two groups before.
        self.in_groups = bits in _GROUPS and width * bits % (8 * size) == 0 and self.before <= 8 * size
        if self.in_groups:
            self.values = group_values(table, bits, _GROUPS[bits][1], keep=keep)
        else:
            codes = torch.arange(2**bits, dtype=torch.uint8, device=table.device)
            self.values = group_values(codes, bits, keep=keep)

    def look_up_(self, packed: Tensor, out: Tensor) -> Tensor:
        """Overwrite flat ``out`` with the values of the first codes in flat bytes, whole rows; returns it."""
        if self.in_groups:
            self._look_groups_up_(packed[: out.numel() * self.bits // 8], out)
            return out
        codes = torch.empty(out.numel(), dtype=torch.uint8, device=out.device)
        codes = look_up_(packed, self.bits, self.values, codes).view(-1, self.width)
        return out.copy_(window.look_up(codes, self.table, self.bits).view(-1))

    def _look_groups_up_(self, packed: Tensor, out: Tensor) -> None:
        size, unit = _GROUPS[self.bits]
        own = words(packed, size).view(-1, self.width * self.bits // (8 * size))
        numbers = own << self.before
        numbers[:, 1:] |= own[:, :-1] >> 8 * size - self.before  # before a row's first code there are zeros
        numbers = numbers.view(-1)
        values, places = as_elements(self.values, out.view(-1, 8 * size // unit, self.values.shape[1]))
        for part in range(8 * size // unit):
            number = numbers >> part * unit & 2 ** (unit + self.before) - 1 if size > 1 else numbers
            select_(values, number, places[:, part])
