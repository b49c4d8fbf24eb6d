"""What ranks tell each other has the values and gradients that one process computes in float64."""

from __future__ import annotations

import jobs_of_collectives as jobs
import pytest
import torch
from processes import in_processes

from qlora_kit.layers.sharded import collectives

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("size", [pytest.param(4, id="even"), pytest.param(5, id="uneven")])
def test_values_and_gradients_are_those_of_one_process(size: int) -> None:
    for rank in in_processes(jobs.pairs, 2, length=size):
        assert set(rank) == {"reduce", "gather", "copy", "gather for parts", "split", "reduce to pieces"}
        for name, pairs in rank.items():
            for found, expected in pairs:
                torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("size", "count"), [(4, 2), (5, 2), (5, 4), (1, 3), (0, 2)])
def test_pieces_are_those_of_chunk(size: int, count: int) -> None:
    chunks = [len(chunk) for chunk in torch.arange(size).chunk(count)] if size else []
    assert collectives.pieces_of(size, count) == [*chunks, *[0] * (count - len(chunks))]


def test_one_process_is_told_nothing() -> None:
    x = torch.randn(3, 2)
    for function in (collectives.copy_to_group, collectives.reduce_from_group):
        assert function(x) is x
