"""The registry of ways to a start, what every one of them reports, and the quantizers that it runs with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loftq import LoftQResult, Problem, factorize, register_method
from loftq.methods import registry as methods
from qlora_kit.codecs.codebooks import STORED_TYPES
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import delta

# The library's errors are sums over some hundred float32 products.
RELATIVE = 1e-5


def weight(shape: tuple[int, int] = (24, 32), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(width: int = 32, kind: str = "full") -> Tensor:
    """E[x x^T] of correlated inputs whose scales differ, or its diagonal."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    inputs = torch.randn(400, width, generator=generator) @ mixing
    full = inputs.T @ inputs / len(inputs)
    return full if kind == "full" else full.diagonal().clone()


def root_mean_square_output(matrix: np.ndarray, statistics: Tensor) -> float:
    """sqrt(E ||matrix @ x||^2) term by term, in float64."""
    R = statistics.double().numpy()
    R = np.diag(R) if R.ndim == 1 else R
    return float(np.sqrt(sum(row @ R @ row for row in matrix.astype(np.float64))))


def left_over(full: Tensor, result: LoftQResult, scaling: float) -> np.ndarray:
    product = scaling * result.B.double().numpy() @ result.A.double().numpy()
    return full.double().numpy() - result.quantized.dequantize().double().numpy() - product


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test go with it."""
    monkeypatch.setattr(methods, "_registry", dict(methods._registry))


def plain(problem: Problem) -> LoftQResult:
    """The zero start, as a method."""
    quantized = problem.quantize(problem.weight)
    A = torch.zeros(problem.rank, problem.weight.shape[1])
    B = torch.zeros(problem.weight.shape[0], problem.rank)
    error = float((problem.weight - quantized.dequantize()).norm() / problem.weight.norm())
    return LoftQResult(quantized, A, B, [error], error, error)


# -- the registry ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_registry")
def test_a_registered_method_is_reached_with_the_whole_problem() -> None:
    seen: list[Problem] = []

    @register_method("mine")
    def mine(problem: Problem) -> LoftQResult:
        seen.append(problem)
        return plain(problem)

    full, statistics = weight().bfloat16(), moments().double()
    result = factorize(
        full, 3, bits=2, steps=7, scaling=0.5, statistics=statistics, method="mine", solver="krylov", seed=11
    )
    (problem,) = seen
    assert torch.equal(problem.weight, full.float())
    assert (problem.rank, problem.scaling, problem.steps, problem.solver, problem.seed) == (3, 0.5, 7, "krylov", 11)
    assert problem.quantize(problem.weight).quant_type == "signed2"
    assert problem.statistics is not None
    assert torch.equal(problem.statistics, statistics.float())
    assert torch.equal(delta(result.A, result.B, 0.5), torch.zeros(24, 32))
    assert result.output_error == result.zero_output_error
    assert result.output_error is not None
    assert mine is methods.method_for("mine"), "the decorator gives the function back"


@pytest.mark.usefixtures("_registry")
def test_the_latest_registration_wins() -> None:
    first = factorize(weight(), 3)
    register_method("loftq")(plain)
    assert first.error < factorize(weight(), 3).error == pytest.approx(first.zero_error, rel=RELATIVE)


@pytest.mark.usefixtures("_registry")
def test_the_start_of_an_adapter_takes_registered_methods() -> None:
    from qlora_kit import LoftQConfig, LoraConfig, apply_lora

    register_method("plain")(plain)
    options = LoftQConfig(loftq_bits=2, method="plain")
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights="loftq", loftq_config=options)
    lora = apply_lora(torch.nn.Sequential(torch.nn.Linear(32, 24)), config)
    A, B = lora.adapter_layers()["0"].factors("default")
    assert not A.any()
    assert not B.any()


def test_an_unknown_method_is_refused_with_the_closest() -> None:
    message = r"method: expected one of .*'loftq'.*, found 'lofqt'; the closest are \['loftq'"
    with pytest.raises(ConfigError, match=message):
        factorize(weight(), 3, method="lofqt")


# -- statistics and errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["full", "diagonal"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_output_errors_equal_the_reference(bits: int, kind: str, scaling: float) -> None:
    full, statistics = weight(), moments(kind=kind)
    result = factorize(full, 4, bits=bits, steps=3, scaling=scaling, statistics=statistics)
    size = root_mean_square_output(full.numpy(), statistics)
    expected = root_mean_square_output(left_over(full, result, scaling), statistics) / size
    # The summands of a full matrix have both signs, and what cancels leaves its rounding.
    assert result.output_error == pytest.approx(expected, rel=1e-4)
    first = factorize(full, 4, bits=bits, steps=1).quantized.dequantize()  # the plain quantized weight
    zero = root_mean_square_output((full.double() - first.double()).numpy(), statistics) / size
    assert result.zero_output_error == pytest.approx(zero, rel=1e-4)


def test_a_diagonal_is_a_full_matrix_of_it() -> None:
    diagonal = moments(kind="diagonal")
    first, second = (factorize(weight(), 4, bits=3, statistics=given) for given in (diagonal, diagonal.diag()))
    assert first.output_error == pytest.approx(second.output_error, rel=RELATIVE)
    assert first.zero_output_error == pytest.approx(second.zero_output_error, rel=RELATIVE)


def test_white_inputs_weigh_as_the_frobenius_norm_does() -> None:
    result = factorize(weight(), 4, bits=3, steps=3, statistics=torch.ones(32))
    assert result.output_error == pytest.approx(result.error, rel=RELATIVE)
    assert result.zero_output_error == pytest.approx(result.zero_error, rel=RELATIVE)


def test_statistics_only_report() -> None:
    without, given = (factorize(weight(), 4, bits=2, statistics=s) for s in (None, moments()))
    assert without.output_error is None
    assert without.zero_output_error is None
    assert without.history == given.history
    assert torch.equal(without.A, given.A)
    assert torch.equal(without.quantized.codes, given.quantized.codes)


def test_inputs_that_are_always_zero_leave_no_error() -> None:
    for statistics in (torch.zeros(32), torch.zeros(32, 32)):
        result = factorize(weight(), 4, statistics=statistics)
        assert result.output_error == result.zero_output_error == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_quantization_error_is_of_the_weight_returned(bits: int, steps: int) -> None:
    full = weight()
    result = factorize(full, 4, bits=bits, steps=steps)
    stored = result.quantized.dequantize().double()
    expected = float(np.linalg.norm((full.double() - stored).numpy()) / np.linalg.norm(full.double().numpy()))
    assert result.quantization_error == pytest.approx(expected, rel=RELATIVE)
    assert result.error < result.quantization_error
    assert steps > 1 or result.quantization_error == result.zero_error


def broken(value: float, *, full: bool) -> Tensor:
    statistics = moments() if full else moments(kind="diagonal")
    statistics[(3, 3) if full else 3] = value
    return statistics


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        (torch.ones(31), r"\(32, 32\) or their diagonal \(32,\) for a weight \(24, 32\), found \(31,\)"),
        (torch.ones(24), r"found \(24,\)"),
        (torch.ones(32, 24), r"found \(32, 24\)"),
        (torch.ones(1, 32), r"found \(1, 32\)"),
        (torch.tensor(1.0), r"found \(\)"),
        (broken(float("nan"), full=False), "expected finite second moments"),
        (broken(float("nan"), full=True), "expected finite second moments"),
        (broken(float("inf"), full=True), "expected finite second moments"),
        (torch.full((32,), 1e300, dtype=torch.float64), "expected finite second moments"),
        (broken(-1e-6, full=False), "a diagonal of at least 0, found .* negative mean square"),
        (broken(-1e-6, full=True), "a diagonal of at least 0, found .* negative mean square"),
    ],
)
def test_statistics_that_can_t_be_are_refused(statistics: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^statistics: .*{message}"):
        factorize(weight(), 4, statistics=statistics)


def test_off_diagonal_moments_may_be_negative() -> None:
    statistics = torch.eye(32)
    statistics[0, 1] = statistics[1, 0] = -0.5
    assert factorize(weight(), 4, statistics=statistics).output_error is not None


# -- quantizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [64, 48, "row", None])
@pytest.mark.parametrize("quant_type", STORED_TYPES)
@pytest.mark.slow
def test_every_type_brings_the_weight_nearer(quant_type: str, blocksize: int | str | None, double_quant: bool) -> None:
    if quant_type == "int8" and double_quant:
        with pytest.raises(ConfigError, match="double_quant: expected False with int8"):
            factorize(weight(), 4, quant_type=quant_type, blocksize=blocksize, double_quant=True)
        return
    full = weight((33, 47))
    result = factorize(full, 5, quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, steps=3)
    found = result.quantized
    assert (found.quant_type, found.double_quant) == (quant_type, double_quant)
    of_rows = blocksize in ("row", None) or quant_type.startswith(("rotated", "trellis"))
    rows = 47 if of_rows else blocksize
    assert found.blocksize == (None if quant_type == "int8" else rows)
    assert int(found.codes.max()) < 2**found.bits
    assert result.error < result.quantization_error
    assert result.error < result.zero_error
    left = np.linalg.norm(left_over(full, result, 1.0)) / np.linalg.norm(full.double().numpy())
    assert result.error == pytest.approx(float(left), rel=RELATIVE)


def test_rows_are_named_or_none() -> None:
    by_name, by_none = (factorize(weight(), 4, blocksize=blocksize) for blocksize in ("row", None))
    assert by_name.history == by_none.history
    assert by_name.quantized.scales.shape == (24,)


# -- solvers ---------------------------------------------------------------------------------------------------


def test_random_starts_are_repeatable_by_their_seed() -> None:
    full = weight((200, 240))
    first, again, other = (factorize(full, 6, bits=2, steps=3, solver="krylov", seed=s) for s in (5, 5, 6))
    assert first.history == again.history
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    assert torch.equal(first.quantized.codes, again.quantized.codes)
    assert not torch.equal(first.A, other.A)
    assert other.error == pytest.approx(first.error, rel=1e-2)  # as good, by other bits


@pytest.mark.parametrize("solver", ["full", "gram", "krylov", "subspace"])
def test_every_solver_beats_the_zero_start(solver: str) -> None:
    result = factorize(weight((200, 240)), 6, bits=2, steps=3, solver=solver)
    assert result.error < result.zero_error
    assert result.error == min(result.history)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [2, 4])
def test_large_weights_lose_next_to_nothing_by_the_approximate_solver(bits: int) -> None:
    full = weight((1024, 1024))
    quick, exact = (factorize(full, 32, bits=bits, steps=3, solver=solver) for solver in ("auto", "gram"))
    assert quick.zero_error == exact.zero_error
    assert quick.zero_error - quick.error >= 0.985 * (exact.zero_error - exact.error)
    chosen = factorize(full, 32, bits=bits, steps=1)
    krylov = factorize(full, 32, bits=bits, steps=1, solver="krylov")
    assert torch.equal(chosen.A, krylov.A)
