"""What ranks tell each other has the values and gradients that one process computes in float64."""

from __future__ import annotations

import jobs_of_collectives as jobs
import pytest
import torch
from processes import in_processes

from qlora_kit.layers.sharded import collectives

NAMES = [
    "copy_to_group",
    "reduce_from_group",
    "gather_from_group",
    "split_to_group",
    "gather_for_parts",
    "reduce_to_pieces",
]


@pytest.fixture(scope="module")
def found() -> list[dict[int, jobs.Found]]:
    return in_processes(jobs.of_every_size, 2)


@pytest.mark.slow
@pytest.mark.parametrize("size", [pytest.param(4, id="even"), pytest.param(5, id="uneven")])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_one_process(
    found: list[dict[int, jobs.Found]], name: str, size: int
) -> None:
    for rank in found:
        for mine, expected in rank[size][name]:
            torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 2), (5, 4), (1, 3)])
def test_pieces_are_those_of_chunk(size: int, count: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(size).chunk(count)]
    assert collectives.pieces_of(size, count) == [*chunks, *[0] * (count - len(chunks))]


def test_one_process_tells_nobody() -> None:
    x = torch.randn(3, 2)
    assert collectives.copy_to_group(x) is x
    assert collectives.reduce_from_group(x) is x
    assert collectives.gather_from_group(x, 0) is x
