"""The norm that inputs weigh errors by: its factor, the way there and back, and what can't be second moments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.starts import damped, output_error
from torch import Tensor

from loftq.methods.metric import DAMPING, LEAST_DAMPING, Metric
from qlora_kit.errors import ConfigError

WIDTH = 23
# An entry of the factor is rounded to float32, 6e-8 of itself, and a sum of 23 products of two holds 46 of these.
RELATIVE = 3e-6


def inputs(count: int = 200, width: int = WIDTH, seed: int = 0) -> Tensor:
    """Correlated inputs (count, width) whose mean squares are 1e4 apart."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(count, width, generator=generator) @ mixing


def moments(rows: Tensor) -> Tensor:
    return rows.T @ rows / len(rows)


def with_zero_columns() -> Tensor:
    rows = inputs()
    rows[:, [0, 7, 22]] = 0
    return moments(rows)


CASES = {
    "many inputs": moments(inputs()),
    "fewer inputs than columns": moments(inputs(5)),
    "one input": moments(inputs(1)),
    "columns that are always zero": with_zero_columns(),
    "equal columns": moments(inputs()[:, [0] * WIDTH]),
    "tiny": moments(inputs()) * 1e-20,
    "huge": moments(inputs()) * 1e20,
    "float64": moments(inputs().double()),
    "bfloat16": moments(inputs()).bfloat16(),
    "float16": moments(inputs() / 100).half(),
}


def product(metric: Metric) -> np.ndarray:
    """F F^T with rows and columns in the weight's order."""
    assert metric.factor is not None
    F = metric.factor.double().numpy()
    if metric.order is None:
        return np.diag(F**2)
    back = np.argsort(metric.order.numpy())
    return (F @ F.T)[np.ix_(back, back)]


@pytest.mark.parametrize("case", CASES)
def test_the_factor_times_its_transpose_is_the_damped_moments(case: str) -> None:
    given = CASES[case]
    expected = damped(given.double().numpy())
    largest = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))  # by Cauchy and Schwarz, of what is summed up
    metric = Metric.of(given)
    assert np.abs((product(metric) - expected) / largest).max() < RELATIVE
    diagonal = Metric.of(given, diagonal=True)
    np.testing.assert_allclose(product(diagonal), np.diag(np.diag(expected)), rtol=RELATIVE)
    np.testing.assert_allclose(product(Metric.of(given.diagonal())), product(diagonal), rtol=RELATIVE)


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1.0])
def test_the_damping_is_a_share_of_the_mean_square(damping: float) -> None:
    given = moments(inputs())
    for diagonal in (False, True):
        found = np.diag(product(Metric.of(given, damping=damping, diagonal=diagonal)))
        np.testing.assert_allclose(found, np.diag(damped(given.double().numpy(), damping)), rtol=RELATIVE)


def test_no_damping_leaves_inputs_that_are_always_zero_a_little() -> None:
    given = with_zero_columns()
    for diagonal in (False, True):
        metric = Metric.of(given, damping=0.0, diagonal=diagonal)
        found = np.diag(product(metric))[[0, 7, 22]]
        np.testing.assert_allclose(found, LEAST_DAMPING * float(given.diagonal().double().mean()), rtol=1e-4)
        assert metric.unweigh(torch.ones(2, WIDTH)).isfinite().all()


def test_the_triangle_takes_columns_by_falling_mean_square() -> None:
    given = moments(inputs())
    metric = Metric.of(given)
    assert metric.factor is not None
    assert metric.order is not None
    assert metric.order.tolist() == sorted(range(WIDTH), key=lambda k: -float(given[k, k]))
    assert torch.equal(metric.factor, metric.factor.triu())
    assert (metric.factor.diagonal() > 0).all()


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_weighing_and_unweighing_undo_each_other(case: str, diagonal: bool) -> None:
    metric = Metric.of(CASES[case], diagonal=diagonal)
    matrix = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    # A triangle solved with is wrong by float32's rounding of what is multiplied times its condition number, which
    # damping keeps below sqrt(23 / 0.01 + 1) = 48.
    tolerance = 48 * RELATIVE
    there, back = metric.weigh(matrix), metric.unweigh(matrix)
    assert float((metric.unweigh(there) - matrix).norm() / matrix.norm()) < tolerance
    assert float((metric.weigh(back) - matrix).norm() / matrix.norm()) < tolerance


def test_the_weighed_norm_is_the_mean_output_error_over_inputs() -> None:
    rows = inputs(40)
    error = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(2))
    mean = output_error(error.numpy(), rows.numpy())
    pull = DAMPING * float(rows.double().square().mean()) * float(error.double().square().sum())
    found = float(Metric.of(moments(rows)).weigh(error).double().square().sum())
    assert found == pytest.approx(mean + pull, rel=1e-5)


def test_a_plain_metric_changes_nothing() -> None:
    matrix = torch.randn(3, WIDTH)
    for metric in (Metric(), Metric.of(None), Metric.of(torch.zeros(WIDTH, WIDTH)), Metric.of(torch.zeros(WIDTH))):
        assert metric.plain
        assert metric.weigh(matrix) is matrix
        assert metric.unweigh(matrix) is matrix
    assert not Metric.of(torch.ones(WIDTH)).plain


def test_a_scale_of_the_inputs_goes_through() -> None:
    """A power of two times the moments is its root times the factor, bit for bit."""
    given = moments(inputs())
    for diagonal in (False, True):
        first, second = (Metric.of(given * scale, diagonal=diagonal).factor for scale in (1.0, 2.0**40))
        assert first is not None
        assert second is not None
        assert torch.equal(first * 2.0**20, second)


def test_the_rounding_of_moments_is_damped_away() -> None:
    """One direction far above the others, in bfloat16: entries 2^-9 off leave negative eigenvalues behind."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(WIDTH, generator=generator)
    rounded = torch.outer(direction, direction).bfloat16().double()
    least = float(torch.linalg.eigvalsh(rounded)[0])
    assert least < -1e-4 * float(rounded.diagonal().mean()), "rounding is too small for this test"
    metric = Metric.of(rounded, damping=1e-6)
    added = product(metric) - rounded.numpy()
    shift = added.trace() / WIDTH
    assert -least < shift <= 2**-8 * float(rounded.norm())
    np.testing.assert_allclose(added, shift * np.eye(WIDTH), atol=RELATIVE * float(rounded.diagonal().max()))


def random_symmetric() -> Tensor:
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(4))
    matrix = matrix + matrix.T
    return matrix.diagonal_scatter(matrix.diagonal().abs())


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("matrix", [torch.tensor([[1.0, 2.0], [2.0, 1.0]]), random_symmetric()], ids=["two", "many"])
def test_what_isn_t_positive_is_refused_and_not_damped_until_it_is(matrix: Tensor, scale: float) -> None:
    message = r"^statistics: expected second moments E\[x x\^T\], .*positive semidefinite, found a matrix that damping"
    with pytest.raises(ConfigError, match=message):
        Metric.of(matrix * scale)
    assert not Metric.of(matrix * scale, diagonal=True).plain, "its diagonal is one of moments"


@pytest.mark.parametrize(
    "broken",
    [
        torch.tensor([1.0, float("nan")]),
        torch.tensor([1.0, float("inf")]),
        torch.tensor([5.0, -1.0]),
        torch.tensor([[float("nan"), 0.0], [0.0, 1.0]]),
        torch.tensor([[1.0, float("nan")], [float("nan"), 1.0]]),
        torch.tensor([[1.0, float("inf")], [float("inf"), 1.0]]),
        torch.tensor([[-1.0, 0.0], [0.0, 3.0]]),
    ],
)
def test_moments_that_can_t_be_are_refused(broken: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"^statistics: expected finite second moments with a diagonal of at least 0"):
        Metric.of(broken)
