"""Parts of a text: some rows of a batch, and batches that lie evenly in it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loftq.inputs.batches import amid, evenly, in_parts, rows_in


def numbered(count: int, shape: tuple[int, ...] = (2, 8), dtype: torch.dtype = torch.int64) -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.full(shape, number, dtype=dtype)} for number in range(count)]


def test_parts_are_all_of_a_batch_in_its_order_with_what_else_it_says() -> None:
    ids, mask = torch.arange(12).reshape(3, 4), torch.ones(3, 4)
    batch = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    assert rows_in(batch) == 3
    for size, sizes in ((1, [1, 1, 1]), (2, [2, 1]), (5, [3])):
        parts = in_parts(batch, size)
        assert [len(part["input_ids"]) for part in parts] == [len(part["attention_mask"]) for part in parts] == sizes
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), ids)
        assert all(part["use_cache"] is False for part in parts)


@pytest.mark.parametrize("batch", [{"x": torch.ones(2), "y": torch.ones(3)}, {"x": torch.tensor(1)}, {"n": 3}])
def test_what_has_no_rows_is_whole(batch: dict[str, object]) -> None:
    assert (rows_in(batch), in_parts(batch, 1)) == (0, [batch])


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


def test_numbers_amid_equal_parts() -> None:
    assert amid(range(12), 3) == [2, 6, 10]
    assert amid(range(10), 1) == [5]
    assert amid([3, 5, 8], 3) == amid([3, 5, 8], 9) == [3, 5, 8]
    assert amid([], 4) == []
