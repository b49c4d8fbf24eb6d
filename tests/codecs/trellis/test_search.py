"""The search against all paths tried one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import trellis as ref

from qlora_kit.codecs.trellis import search
from qlora_kit.codecs.trellis.search import best_path, codes_of, nearest_paths
from qlora_kit.codecs.trellis.tables import TABLES
from qlora_kit.kernels.window import look_up

# Bits, memory, width: 4096 paths at most.
KINDS = [(2, 4, 6), (2, 3, 5), (2, 2, 5), (2, 8, 6), (3, 5, 4), (3, 3, 4), (4, 5, 3), (4, 4, 3), (2, 4, 1)]
every_kind = pytest.mark.parametrize(("bits", "memory", "width"), KINDS)


def assert_best(codes: torch.Tensor, goal: torch.Tensor, table: torch.Tensor, bits: int) -> None:
    for row, found in zip(goal.double().numpy(), codes.tolist(), strict=True):
        expected, ahead = ref.best_codes(row, table.double().numpy(), bits)
        if ahead > 1e-5:  # else float32 may take the other
            assert found == expected


@every_kind
def test_the_best_path_is_the_best_of_all(bits: int, memory: int, width: int) -> None:
    table, goal = torch.randn(2**memory), 1.5 * torch.randn(7, width)
    path = best_path(goal.T.contiguous(), table, bits)
    codes = codes_of(path, table, bits).T
    assert_best(codes, goal, table, bits)
    assert torch.equal(nearest_paths(goal, table, bits), codes)
    # The states are the numbers that these codes are looked up by.
    assert torch.equal(table[path].T, look_up(codes.contiguous(), table, bits))


@pytest.mark.parametrize(("bits", "memory"), [(2, 4), (2, 7), (3, 5)])
def test_a_path_can_set_out_from_a_state(bits: int, memory: int) -> None:
    table, goal, before = torch.randn(2**memory), torch.randn(6, 4), torch.randint(2**bits, (6, 5))
    start = torch.tensor([ref.value_numbers(row, bits, memory)[-1] for row in before.tolist()])
    found = codes_of(best_path(goal.T.contiguous(), table, bits, start), table, bits).T
    for row, head, codes in zip(goal.double().numpy(), before.tolist(), found.tolist(), strict=True):
        expected, ahead = ref.best_codes(row, table.double().numpy(), bits, tuple(head))
        assert codes == expected or ahead < 1e-5


def test_rows_are_independent_and_searched_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    table, goal = torch.randn(2**5), torch.randn(9, 40)
    whole = nearest_paths(goal, table, 2)
    assert torch.equal(torch.cat([nearest_paths(row[None], table, 2) for row in goal]), whole)
    monkeypatch.setattr(search, "_COSTS", 2 * table.numel())
    assert torch.equal(nearest_paths(goal, table, 2), whole)


def test_columns_are_decided_in_pieces_for_hardly_more_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a sample of 65,000 values; pieces of 128 columns with 32 in view cost 0.1 % of the error in the mean.
    table, goal = torch.tensor(TABLES[2]), torch.randn(128, 512)

    def error(codes: torch.Tensor) -> float:
        return (look_up(codes, table, 2) - goal).double().square().mean().item()

    pieces = error(nearest_paths(goal, table, 2))
    monkeypatch.setattr(search, "_PIECE", 512)
    whole = error(nearest_paths(goal, table, 2))
    assert whole <= pieces <= 1.004 * whole


def test_values_of_a_path_are_found_again() -> None:
    """What reads exactly as some codes do is found as these, with any others that read the same."""
    table, codes = torch.tensor(TABLES[2]), torch.randint(4, (20, 200), dtype=torch.uint8)
    values = look_up(codes, table, 2)
    assert torch.equal(look_up(nearest_paths(values, table, 2), table, 2), values)


def test_nothing_to_search() -> None:
    table = torch.randn(16)
    assert nearest_paths(torch.empty(0, 5), table, 2).shape == (0, 5)
    assert nearest_paths(torch.empty(3, 0), table, 2).shape == (3, 0)
    assert np.array_equal(nearest_paths(torch.zeros(2, 3), torch.zeros(16), 2).numpy() < 4, np.ones((2, 3), bool))
