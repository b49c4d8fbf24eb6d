"""The trellis types' tables: of what sizes, and that no step of Lloyd's makes them much better."""

from __future__ import annotations

import pytest
import torch

from qlora_kit.codecs.codebooks import SCHEMES, codebook, scheme
from qlora_kit.codecs.trellis.search import best_path
from qlora_kit.codecs.trellis.tables import TABLES

every_number = pytest.mark.parametrize("bits", TABLES)


@every_number
def test_sizes_are_those_of_the_memory(bits: int) -> None:
    kind, rotated = scheme(f"trellis{bits}"), scheme(f"rotated{bits}")
    table = codebook(f"trellis{bits}")
    assert table.shape == (2**kind.memory,) == (4**bits * {2: 16, 3: 8, 4: 4}[bits],)
    assert rotated.memory == rotated.bits == kind.bits == bits
    assert table.isfinite().all()
    assert {name for name, one in SCHEMES.items() if one.memory > one.bits} == {f"trellis{b}" for b in TABLES}


@every_number
def test_levels_are_nearly_the_means_of_what_is_read_as_them(bits: int) -> None:
    table, values = torch.tensor(TABLES[bits]), torch.randn(96, 1024)
    read = table[best_path(values, table, bits)]
    error = (read - values).square().mean()
    states = best_path(values, table, bits).view(-1)
    counts = torch.bincount(states, minlength=len(table)).clamp_min(1)
    means = torch.zeros_like(table).index_add_(0, states, values.view(-1)) / counts
    moved = torch.where(counts > 8, means, table)
    left = (moved[states].view_as(values) - values).square().mean()
    # What moving levels to the means of this very sample would gain: some is the sample's own noise.
    assert error - left < 0.02 * error


@every_number
def test_what_a_state_goes_on_to_is_spread(bits: int) -> None:
    """Each has a level below zero and one above among its next, nearly everywhere: else a path would be stuck."""
    table = torch.tensor(TABLES[bits])
    shared = len(table) // 2**bits
    after = table.view(2**bits, shared)  # by a code's own bits, which are the topmost
    assert ((after.amin(0) < 0) & (after.amax(0) > 0)).float().mean() > 0.95
