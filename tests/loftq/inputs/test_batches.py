"""Parts of a text: single rows, and batches that lie evenly in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq.inputs.batches import evenly, single_rows


def numbered(count: int, shape: tuple[int, ...] = (2, 8), dtype: torch.dtype = torch.int64) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.full(shape, number, dtype=dtype)} for number in range(count)]


def test_rows_are_all_of_a_batch_in_their_order_with_what_else_it_says() -> None:
    ids, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4)
    rows = single_rows({"input_ids": ids, "attention_mask": mask, "use_cache": False})
    assert [row["input_ids"].shape for row in rows] == [(1, 4)] * 3
    assert torch.equal(torch.cat([row["input_ids"] for row in rows]), ids)
    assert all(row["use_cache"] is False for row in rows)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.tensor(1)}, {"n": 3}])
def test_what_has_no_rows_is_one(batch: dict[str, object]) -> None:
    assert single_rows(batch) == [batch]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (16 * 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (10**6, [0, 1, 2, 3, 4, 5, 6, 7]),
        (64, [0, 2, 4, 6]),
        (50, [0, 2, 5]),
        (1, [0]),
    ],
)
def test_few_batches_lie_evenly(tokens: int, expected: list[int]) -> None:
    assert [int(batch["input_ids"][0, 0]) for batch in evenly(numbered(8), tokens)] == expected


def test_vectors_count_as_the_tokens_they_stand_for() -> None:
    assert len(evenly(numbered(8, (2, 8, 300), torch.float32), 64)) == 4
