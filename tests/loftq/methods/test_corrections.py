"""The branch that a quantized weight is given: the closed form of least output error, which nothing beats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.starts import closest_correction, damped, descended, output_error, weighted_error
from torch import Tensor

from loftq import LoftQResult, factorize
from loftq.methods.alternation import correction
from loftq.methods.metric import Metric
from qlora_kit.lowrank import delta

# The library decomposes in float32: a branch is right within 1e-6 of its size times the metric's condition number,
# which damping keeps below sqrt(width / 0.01 + 1), 54 for 29 columns.
RELATIVE = 6e-5


def weight(shape: tuple[int, int] = (17, 29), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(width: int = 29, count: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(count, width, generator=generator) @ mixing


def moments(width: int = 29, count: int = 300) -> Tensor:
    rows = inputs(width, count)
    return rows.T @ rows / count


def metrics(width: int = 29, count: int = 300) -> list[tuple[Metric, np.ndarray]]:
    """Metrics and the moments that they stand for: all of them, and the diagonal."""
    full = moments(width, count)
    return [
        (Metric.of(full), damped(full.double().numpy())),
        (Metric.of(full, diagonal=True), damped(full.diagonal().double().numpy())),
    ]


def product(result: LoftQResult, scaling: float) -> np.ndarray:
    return scaling * result.B.double().numpy() @ result.A.double().numpy()


@pytest.mark.parametrize("rank", [1, 5, 17])
@pytest.mark.parametrize("count", [300, 6])
@pytest.mark.parametrize("method", ["qera", "qera-diag", "cloq"])
def test_the_branch_is_the_closed_form_of_what_its_weight_leaves(method: str, count: int, rank: int) -> None:
    full, scaling = weight(), 2.0
    result = factorize(
        full, rank, bits=2, steps=1, scaling=scaling, method=method, statistics=moments(count=count), double_quant=True
    )
    left = full.double().numpy() - result.quantized.dequantize().double().numpy()
    given = moments(count=count).double().numpy()
    R = damped(np.diag(given) if method == "qera-diag" else given)
    expected = closest_correction(left, R, rank)
    found = product(result, scaling)
    assert np.linalg.norm(found - expected) < RELATIVE * np.linalg.norm(expected)
    if rank < 17:
        least, size = weighted_error(left - expected, R), weighted_error(full.numpy(), R)
        assert weighted_error(left - found, R) == pytest.approx(least, rel=1e-6)
        assert result.history == pytest.approx([np.sqrt(least / size)], rel=1e-5)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_no_change_of_the_factors_lowers_the_weighted_error(size: float) -> None:
    error, draw = weight(seed=3), np.random.default_rng(0)
    for metric, R in metrics():
        A, B = (side.double().numpy() for side in correction(error, 4, 1.0, metric=metric))
        least = weighted_error(error.double().numpy() - B @ A, R)
        for _ in range(50):
            other = (B + size * B.std() * draw.standard_normal(B.shape)) @ (
                A + size * A.std() * draw.standard_normal(A.shape)
            )
            # At the least itself, the branch's own rounding moves the error in second order.
            assert weighted_error(error.double().numpy() - other, R) > least * (1 - 1e-9)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_long_descent_gets_to_the_closed_form_and_no_lower(rank: int) -> None:
    error = weight((7, 9), seed=4)
    for metric, R in metrics(9):
        A, B = correction(error, rank, 1.0, metric=metric)
        least = weighted_error(error.double().numpy() - delta(A, B, 1.0).double().numpy(), R)
        descents = [descended(error.double().numpy(), R, rank, seed) for seed in range(2)]
        assert min(descents) > least * (1 - 1e-6)
        assert min(descents) == pytest.approx(least, rel=1e-6)


def test_correlations_are_worth_having() -> None:
    """Over the inputs themselves: the full metric's branch beats the diagonal's, and that beats the plain one."""
    error, rows = weight(seed=5), inputs()
    full = moments()
    losses = []
    for metric in (Metric.of(full, damping=1e-6), Metric.of(full, diagonal=True, damping=1e-6), Metric()):
        left = error - delta(*correction(error, 4, 1.0, metric=metric), 1.0)
        losses.append(output_error(left.numpy(), rows.numpy()))
    assert losses[0] < losses[1] < losses[2]


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 16 / np.sqrt(5)])
@pytest.mark.parametrize("solver", ["auto", "full", "gram", "krylov"])
def test_both_sides_of_a_direction_are_as_long_and_the_scaling_is_counted(scaling: float, solver: str) -> None:
    error = weight((40, 52), seed=6)
    for metric, R in metrics(52):
        A, B = correction(error, 5, scaling, metric=metric, solver=solver)
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-5, atol=0)
        expected = closest_correction(error.double().numpy(), R, 5)
        missed = np.linalg.norm(delta(A, B, scaling).double().numpy() - expected) / np.linalg.norm(expected)
        # Krylov's span has 32 of 40 dimensions, and is near the wanted directions rather than around them.
        assert missed < (3e-3 if solver == "krylov" else 2e-4)


def test_nothing_to_correct_is_a_branch_of_zeros() -> None:
    error = torch.zeros(17, 29)
    error[4] = weight()[4]  # rank 1
    for metric, _ in metrics():
        A, B = correction(torch.zeros(17, 29), 3, 1.0, metric=metric)
        assert not A.any()
        assert not B.any()
        A, B = correction(error, 3, 1.0, metric=metric)
        assert A.isfinite().all()
        assert B.isfinite().all()
        torch.testing.assert_close(delta(A, B, 1.0), error, rtol=0, atol=1e-6)


@pytest.mark.parametrize("units", [1e-30, 1e-20, 1e20, 1e30])
def test_units_of_the_error_don_t_matter(units: float) -> None:
    error = weight(seed=7)
    for metric, _ in metrics():
        A, B = correction(error * units, 4, 1.0, metric=metric)
        expected = delta(*correction(error, 4, 1.0, metric=metric), 1.0)
        assert float((delta(A, B, 1.0) / units - expected).norm() / expected.norm()) < RELATIVE
        torch.testing.assert_close(A.double().norm(dim=1), B.double().norm(dim=0), rtol=1e-5, atol=0)
