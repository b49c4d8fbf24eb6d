"""LoftQ starts, parts of quantized fused linears and tied tables on Megatron's models, at world sizes 1 and 2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.engines

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
Runs = dict[int, list[dict[str, Any]]]


@pytest.fixture
def others(more_runs: Any) -> Runs:
    return {size: [rank["others"] for rank in more_runs[size]] for size in (1, 2)}


def test_a_loftq_start_is_that_of_the_whole_weight(others: Runs) -> None:
    (one,) = others[1]
    for rank in others[2]:
        torch.testing.assert_close(rank["loftq"], one["loftq"], **CLOSE)
        torch.testing.assert_close(
            torch.tensor(rank["loftq losses"]), torch.tensor(one["loftq losses"]), atol=1e-5, rtol=0
        )


def test_parts_of_quantized_linears_train_and_merge(others: Runs) -> None:
    (one,) = others[1]
    for run in (one, *others[2]):
        torch.testing.assert_close(
            torch.tensor(run["parts losses"]), torch.tensor(one["parts losses"]), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(run["parts in float32"], run["parts"], **CLOSE)
        assert torch.equal(run["parts unmerged"], run["parts"])
        assert not torch.equal(run["parts merged"], run["parts"])  # which is rounded


def test_an_adapter_on_a_tied_table_is_in_the_head_too(others: Runs) -> None:
    (one,) = others[1]
    for rank in others[2]:
        torch.testing.assert_close(
            torch.tensor(rank["tied"]["losses"]), torch.tensor(one["tied"]["losses"]), rtol=1e-5, atol=0
        )
        for path, pair in one["tied"]["gradients"].items():
            for found, expected in zip(rank["tied"]["gradients"][path], pair, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert all(
        torch.equal(others[2][0]["tied"]["replicas"][p], others[2][1]["tied"]["replicas"][p])
        for p in one["tied"]["replicas"]
    )
