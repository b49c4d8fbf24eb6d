"""Fit the tables of the trellis types anew: ``qlora_kit/codecs/trellis/tables.py`` is made of what this prints.

Lloyd's steps through the search: independent normal values are rounded by a table, and each level becomes the mean of
the values that were rounded to it. It starts from quantiles of the normal distribution in a random order, which spreads
the levels that a state can go to.

Run: python benchmarks/trellis_tables.py (some minutes)
"""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.codecs.trellis.search import best_path, nearest_paths
from qlora_kit.kernels.window import look_up

# Bits of a code, bits that a value depends on, steps.
TABLES = ((2, 8, 25), (3, 9, 18), (4, 10, 14))
_COLUMNS, _ROWS = 128, 2048
# How many observations the level before counts for; fewer in the last steps.
_PULL, _LAST_PULL, _LAST = 2.0, 0.2, 3


def quantiles(count: int) -> Tensor:
    """Of the normal distribution, float32 (count,), in random order."""
    shares = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return (torch.erfinv(2 * shares - 1) * 2**0.5)[order].float()


def fitted(bits: int, memory: int, steps: int) -> Tensor:
    """The table, float32 (2^memory,), in whole thousandths."""
    torch.manual_seed(1)
    table = quantiles(2**memory)
    for step in range(steps):
        values = torch.randn(_COLUMNS, _ROWS)
        states = best_path(values, table, bits).view(-1)
        counts = torch.zeros_like(table).index_add_(0, states, torch.ones(len(states)))
        sums = torch.zeros_like(table).index_add_(0, states, values.view(-1))
        pull = _PULL if step < steps - _LAST else _LAST_PULL
        table = (sums + pull * table) / (counts + pull)
    return (table * 1000).round() / 1000


def main() -> None:
    for bits, memory, steps in TABLES:
        table = fitted(bits, memory, steps)
        values = torch.randn(256, 512)
        error = (values - look_up(nearest_paths(values, table, bits), table, bits)).square().mean()
        print(f"{bits} bits, memory of {memory}: squared error {error:.5f} of a normal value's 1")
        print([round(1000 * value) for value in table.tolist()])


if __name__ == "__main__":
    main()
