"""Branches beside megatron-core's sharded linears, each by itself, against the dense formula in float64."""

from __future__ import annotations

from typing import Any

import jobs_of_linears as jobs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.slow


@pytest.fixture(params=[1, 2])
def found(request: pytest.FixtureRequest, runs: Any) -> list[dict[str, dict[str, Tensor]]]:
    return [rank["linears"] for rank in runs[request.param]]


def reference(left: bool) -> dict[str, Tensor]:
    """Output and gradients of y = x (W + s B A)^T + b; ``left`` leaves the bias to others."""
    given = {name: tensor.requires_grad_() for name, tensor in jobs.tensors().items()}
    x, W, b, A, B = (given[name] for name in "xWbAB")
    y = F.linear(x, W + jobs.ALPHA / jobs.RANK * B @ A, None if left else b)
    y.backward(given["G"].detach())
    found: dict[str, Any] = {"y": y.detach(), "x.grad": x.grad, "A.grad": A.grad, "B.grad": B.grad}
    return {**found, "bias": b.detach()} if left else found


@pytest.mark.parametrize("name", jobs.LINEARS)
def test_a_branch_is_the_dense_formula(name: str, found: list[dict[str, dict[str, Tensor]]]) -> None:
    expected = reference(left=jobs.LINEARS[name][1].get("skip_bias_add", False))
    for rank in found:
        assert rank[name].keys() == expected.keys()
        for what, value in expected.items():
            torch.testing.assert_close(rank[name][what], value, msg=lambda text, what=what: f"{what}: {text}")


def test_dropout_draws_for_parts_from_each_ranks_own_state(runs: Any) -> None:
    first, second = (rank["dropout"] for rank in runs[2])
    assert not torch.equal(first["parts"], second["parts"])
    assert torch.equal(first["whole"], second["whole"])
    for rank in (first, second):
        assert set(rank["parts"].tolist()) == set(rank["whole"].tolist()) == {0.0, 2.0}
        assert rank["shared state is as it was"]
    assert torch.equal(first["states agree"], second["states agree"])
    assert all(torch.equal(first["replicas"][path], second["replicas"][path]) for path in first["replicas"])
    assert first["losses"] == second["losses"]


def test_dropout_is_the_same_when_layers_are_computed_again(runs: Any) -> None:
    for rank in (found["dropout"] for found in runs[2]):
        assert rank["recomputed"] == rank["kept"]
