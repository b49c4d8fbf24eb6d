"""What every method promises of its start, with float64 calculations beside it, and where each stands to another."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from reference.loftq import round_blocks
from reference.lowrank import best_approximation
from reference.starts import (
    aligned_weight,
    closest_correction,
    damped,
    output_error,
    sequential_error,
    weighted_error,
)
from torch import Tensor

from loftq import LoftQResult, factorize
from loftq.methods import alignment as library
from loftq.methods.quantizers import quantizer_for
from qlora_kit.errors import ConfigError

METHODS = ["loftq", "qera-diag", "qera", "pissa", "srr", "cloq", "aligned"]
NEEDY = [name for name in METHODS if name not in ("loftq", "pissa")]


def weight(shape: tuple[int, int] = (17, 29), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def inputs(width: int = 29, seed: int = 0, count: int = 300) -> Tensor:
    generator = torch.Generator().manual_seed(20 + seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    return torch.randn(count, width, generator=generator) @ mixing


def seen_by_the_quantized_model(rows: Tensor, seed: int = 0) -> Tensor:
    """Inputs that earlier layers' errors have changed."""
    generator = torch.Generator().manual_seed(40 + seed)
    mixing = torch.eye(rows.shape[1]) + 0.1 * torch.randn(rows.shape[1], rows.shape[1], generator=generator)
    return rows @ mixing


def moments(rows: Tensor, others: Tensor | None = None) -> Tensor:
    return rows.T @ (rows if others is None else others) / len(rows)


def options(method: str, width: int = 29) -> dict[str, Tensor | str | None]:
    rows = inputs(width)
    seen = seen_by_the_quantized_model(rows) if method == "aligned" else rows
    cross = moments(rows, seen) if method == "aligned" else None
    return {"method": method, "statistics": moments(seen), "cross": cross}


def start_of(result: LoftQResult, scaling: float) -> np.ndarray:
    """What the model computes with: Q + s B A, in float64."""
    product = scaling * result.B.double().numpy() @ result.A.double().numpy()
    return result.quantized.dequantize().double().numpy() + product


def of_output(error: np.ndarray, statistics: Tensor) -> float:
    return math.sqrt(max(weighted_error(error, statistics.double().numpy()), 0.0))


@pytest.mark.parametrize("scaling", [2.0, 16 / math.sqrt(5)])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("quant_type", ["nf2", "affine3", "int8"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_errors_are_those_of_what_is_returned(method: str, quant_type: str, steps: int, scaling: float) -> None:
    full, given = weight(), options(method)
    result = factorize(full, 5, quant_type=quant_type, blocksize=16, steps=steps, scaling=scaling, **given)
    W, statistics = full.double().numpy(), given["statistics"]
    left = W - start_of(result, scaling)
    # Errors of int8 are a hundredth of the weight, and their float32 differences have as many digits fewer.
    assert result.error == pytest.approx(np.linalg.norm(left) / np.linalg.norm(W), rel=1e-4)
    goal, R = W, damped(statistics.double().numpy())
    if method == "aligned":
        rows = inputs().double()
        pull = 0.01 * float(statistics.diagonal().double().mean())
        goal = aligned_weight(W, rows.numpy(), seen_by_the_quantized_model(inputs()).double().numpy(), pull)
    missed = of_output(goal - start_of(result, scaling), statistics)
    assert result.output_error == pytest.approx(missed / of_output(goal, statistics), rel=2e-3)
    plain = quantizer_for(quant_type=quant_type, blocksize=16)(full).dequantize().double().numpy()
    zero = of_output(W - plain, statistics) / of_output(W, statistics)
    assert result.zero_output_error == pytest.approx(zero, rel=2e-3)
    assert result.zero_error == pytest.approx(np.linalg.norm(W - plain) / np.linalg.norm(W), rel=1e-5)
    stored = W - result.quantized.dequantize().double().numpy()
    assert result.quantization_error == pytest.approx(np.linalg.norm(stored) / np.linalg.norm(W), rel=1e-5)
    assert 1 <= len(result.history) <= steps
    # The least of the history is the norm that the method minimizes, of what is returned.
    if method in ("loftq", "pissa"):
        R = np.eye(29)
    elif method == "qera-diag":
        R = np.diag(np.diag(R))
    least = math.sqrt(weighted_error(goal - start_of(result, scaling), R) / weighted_error(goal, R))
    # Leaning on the adapter, int8 and BA are each hundreds of times as far off as their sum, digits that float32 lacks.
    rel = 1e-3 if (method, quant_type) == ("aligned", "int8") else 1e-4
    assert min(result.history) == pytest.approx(least, rel=rel)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (40, 13), (13, 40)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_odd_shapes_and_ranks_from_one_to_full(method: str, shape: tuple[int, int]) -> None:
    full = weight(shape)
    for rank in {1, min(shape)}:
        result = factorize(full, rank, bits=2, steps=3, scaling=2.0, **options(method, shape[1]))
        assert result.A.shape == (rank, shape[1])
        assert result.B.shape == (shape[0], rank)
        if rank == min(shape) and method != "aligned":
            # The way there and back through the metric costs its condition number of float32's digits.
            assert result.error < 1e-4
        assert torch.isfinite(result.A).all()
        assert torch.isfinite(result.B).all()


@pytest.mark.parametrize("quant_type", ["nf4", "uniform2", "affine2", "signed2", "int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros_stays_zero(method: str, quant_type: str) -> None:
    result = factorize(torch.zeros(6, 29), 2, quant_type=quant_type, **options(method))
    assert result.error == result.output_error == result.zero_output_error == 0.0
    assert result.history[0] == 0.0
    assert not start_of(result, 1.0).any()


@pytest.mark.parametrize("method", METHODS)
def test_is_repeatable_and_leaves_what_it_is_given_alone(method: str) -> None:
    full, given = weight(), options(method)
    before = [full.clone(), given["statistics"].clone()]
    first, second = (factorize(full, 4, bits=2, steps=3, **given) for _ in range(2))
    assert torch.equal(full, before[0])
    assert torch.equal(given["statistics"], before[1])
    assert first.history == second.history
    for one, other in ((first.A, second.A), (first.B, second.B), (first.quantized.codes, second.quantized.codes)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_any_dtype(method: str, dtype: torch.dtype) -> None:
    given = options(method)
    rounded = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in given.items()}
    exact, result = (factorize(weight(), 5, bits=2, steps=1, **one) for one in (given, rounded))
    W, statistics = weight().double().numpy(), given["statistics"]
    found, expected = (of_output(W - start_of(each, 1.0), statistics) for each in (result, exact))
    # "aligned" aims where a bfloat16 mismatch says, and its metric is damped and not that of the output.
    assert found == pytest.approx(expected, rel=0.1 if method == "aligned" else 0.05)


@pytest.mark.parametrize("units", [1e-30, 1e30])
@pytest.mark.parametrize("method", METHODS)
def test_units_of_the_weight_don_t_matter(method: str, units: float) -> None:
    """Squares of these leave float32's range."""
    first, second = (factorize(weight() * u, 4, bits=2, steps=1, **options(method)) for u in (1.0, units))
    assert second.history == pytest.approx(first.history, rel=1e-4)
    assert second.output_error == pytest.approx(first.output_error, rel=2e-3)
    assert second.error == pytest.approx(first.error, rel=1e-4)


@pytest.mark.parametrize("units", [1e-20, 1e20])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_units_of_the_inputs_don_t_matter(method: str, units: float) -> None:
    given = options(method)
    other = {name: value * units if isinstance(value, Tensor) else value for name, value in given.items()}
    for kind in ("signed2", "affine2"):
        first, second = (
            factorize(weight(), 4, quant_type=kind, steps=1, scale_search=True, **one) for one in (given, other)
        )
        assert second.history == pytest.approx(first.history, rel=1e-4)
        assert second.output_error == pytest.approx(first.output_error, rel=2e-3)


# -- one method beside another ---------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [1, 6])
def test_pissa_quantizes_what_the_principal_part_leaves(bits: int, rank: int) -> None:
    full = weight()
    top = best_approximation(full.double().numpy(), rank)
    result = factorize(full, rank, quant_type=f"nf{bits}", steps=1, scaling=2.0, method="pissa")
    np.testing.assert_allclose(2.0 * (result.B.double() @ result.A.double()).numpy(), top, atol=1e-6)
    stored = round_blocks(full.double().numpy() - top, bits, 64)
    np.testing.assert_allclose(result.quantized.dequantize(), stored, atol=1e-6)
    left = np.linalg.norm(full.double().numpy() - top - stored) / np.linalg.norm(full.double().numpy())
    assert result.history == pytest.approx([left], rel=1e-5)


def test_pissa_beats_plain_rounding_where_few_directions_hold_the_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    full = weight() + torch.randn(17, 3, generator=generator) @ torch.randn(3, 29, generator=generator)
    assert factorize(full, 3, bits=4, method="pissa", steps=1).error < 0.5 * factorize(full, 3, bits=4, steps=1).error


def split_rank(full: np.ndarray, R: np.ndarray, rank: int, kept: int) -> float:
    """The weighted error of NF2 with ``kept`` directions of output left out of what is rounded, relative."""
    goal = full - (closest_correction(full, R, kept) if kept else 0.0)
    left = full - round_blocks(goal, 2, 64)
    return math.sqrt(weighted_error(left - closest_correction(left, R, rank), R) / weighted_error(full, R))


@pytest.mark.parametrize("seed", range(4))
def test_srr_takes_the_best_of_five_splits(seed: int) -> None:
    full, statistics = weight(seed=seed), moments(inputs(seed=seed))
    R = damped(statistics.double().numpy())
    splits = [split_rank(full.double().numpy(), R, 8, kept) for kept in (0, 2, 4, 6, 8)]
    given = {"quant_type": "nf2", "steps": 1, "statistics": statistics, "scaling": 2.0}
    result = factorize(full, 8, method="srr", **given)
    assert result.history == pytest.approx([min(splits)], rel=1e-4)
    # Its two ends: nothing kept is QERA, and all of it kept is corrected once more, so can't be worse than the
    # principal part with what rounding left.
    assert factorize(full, 8, method="qera", **given).history == pytest.approx([splits[0]], rel=1e-4)
    top = closest_correction(full.double().numpy(), R, 8)
    uncorrected = full.double().numpy() - top - round_blocks(full.double().numpy() - top, 2, 64)
    size = math.sqrt(weighted_error(full.numpy(), R))
    assert splits[-1] * size <= math.sqrt(weighted_error(uncorrected, R))
    assert factorize(full, 8, method="srr", **{**given, "steps": 5}).history[0] == pytest.approx(min(splits), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 17])
@pytest.mark.parametrize("quant_type", ["nf4", "int8", "affine2"])
def test_srr_is_never_worse_than_qera_s_first_step(rank: int, quant_type: str) -> None:
    for seed in range(3):
        given = {"quant_type": quant_type, "statistics": moments(inputs(seed=seed))}
        srr = factorize(weight(seed=seed), rank, method="srr", steps=4, **given)
        assert min(srr.history) <= factorize(weight(seed=seed), rank, method="qera", steps=1, **given).history[0]


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("steps", [1, 4])
def test_aligned_to_the_model_s_own_inputs_is_cloq(steps: int, aware: bool) -> None:
    statistics = moments(inputs())
    given = {"bits": 2, "steps": steps, "statistics": statistics, "adapter_aware": aware}
    cloq = factorize(weight(), 4, method="cloq", **given)
    same = factorize(weight(), 4, method="aligned", **given)
    assert same.history == cloq.history
    assert torch.equal(same.A, cloq.A)
    solved = factorize(weight(), 4, method="aligned", cross=statistics, **given)
    assert torch.equal(solved.quantized.codes, cloq.quantized.codes)
    # V is W to float32's last digit.
    assert solved.history == pytest.approx(cloq.history, rel=1e-5)
    assert solved.error == pytest.approx(cloq.error, rel=1e-5)


@pytest.mark.parametrize("count", [300, 12])
@pytest.mark.parametrize("damping", [1e-9, 0.01, 0.3])
def test_the_aligned_weight_is_the_least_squares_solution(count: int, damping: float) -> None:
    """With fewer inputs than columns, the pull towards W decides what they don't; next to none is 1e-7."""
    rows = inputs(count=count)
    seen = seen_by_the_quantized_model(rows)
    pull = max(damping, 1e-7) * float(seen.double().square().mean())
    full, x, y = weight().double().numpy(), rows.double().numpy(), seen.double().numpy()
    expected = aligned_weight(full, x, y, pull)
    double = seen.double()
    statistics, cross = double.T @ double / count, rows.double().T @ double / count
    found = library.aligned_weight(weight(), statistics, cross, damping).double().numpy()
    # Squaring the inputs squares their condition, 1e7 by damping alone, of float64's 16 digits.
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())

    def objective(V: np.ndarray) -> float:
        return sequential_error(full, V, x, y) + pull * np.sum((full - V) ** 2)

    least, draw = objective(found), np.random.default_rng(1)
    for size in (1e-3, 1e-1):
        for _ in range(10):
            assert objective(found + size * np.abs(found).mean() * draw.standard_normal(found.shape)) > least


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.slow
def test_aligned_makes_up_for_what_earlier_layers_did(bits: int) -> None:
    for seed in range(3):
        rows = inputs(seed=seed)
        seen = seen_by_the_quantized_model(rows, seed)
        full = weight(seed=seed)
        losses = []
        for method in ("aligned", "cloq", "qera"):
            result = factorize(
                full, 4, bits=bits, method=method, statistics=moments(seen), cross=moments(rows, seen), scaling=2.0
            )
            start = start_of(result, 2.0)
            losses.append(sequential_error(full.double().numpy(), start, rows.numpy(), seen.numpy()))
        assert losses[0] < 0.9 * losses[1]
        assert losses[1] < losses[2] * 1.02


def test_looking_at_the_inputs_pays_on_the_inputs() -> None:
    """Over the samples, two bits: plain rounding, LoftQ, QERA and CLoQ in this order, on the mean of three weights."""
    losses = []
    for seed in range(3):
        full, rows = weight(seed=seed), inputs(seed=seed)
        size = output_error(full.numpy(), rows.numpy())
        results = [factorize(full, 4, bits=2, method=m, statistics=moments(rows)) for m in ("loftq", "qera", "cloq")]
        losses.append([output_error(full.double().numpy() - start_of(r, 1.0), rows.numpy()) / size for r in results])
        losses[-1].insert(0, results[0].zero_output_error ** 2)
    means = np.mean(losses, axis=0)
    assert (np.diff(means) < 0).all(), means


@pytest.mark.parametrize("method", METHODS)
def test_searched_scales_are_asked_for(method: str) -> None:
    """Each method's own choice is one of the two; for rounding to the nearest codes a search can only help."""
    found = {s: factorize(weight(), 1, bits=2, steps=1, scale_search=s, **options(method)) for s in (True, False, None)}
    own = method in ("cloq", "aligned")
    assert torch.equal(found[None].quantized.codes, found[own].quantized.codes)
    assert not torch.equal(found[True].quantized.scales, found[False].quantized.scales)


# -- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", NEEDY)
def test_statistics_are_asked_for(method: str) -> None:
    message = f"^statistics: expected second moments of the layer's inputs for method '{method}', found None; collect"
    with pytest.raises(ConfigError, match=message):
        factorize(weight(), 4, method=method)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"statistics": torch.ones(28)}, r"statistics: expected second moments of shape \(29, 29\)"),
        ({"statistics": torch.ones(29, 17)}, r"statistics: .* found \(29, 17\)"),
        ({"statistics": torch.full((29, 29), float("nan"))}, "statistics: expected finite second moments"),
        ({"statistics": -torch.eye(29)}, "statistics: .* found NaN, infinity or a negative mean square"),
        ({"statistics": torch.eye(29) - 0.5}, "statistics: expected second moments .* positive semidefinite"),
        ({"cross": torch.ones(29)}, r"cross: expected finite moments E\[x x\^\^T\] of shape \(29, 29\)"),
        ({"cross": torch.ones(17, 29)}, r"cross: .* found \(17, 29\)"),
        ({"cross": torch.full((29, 29), float("nan"))}, "cross: .* values that aren't finite"),
        ({"cross": torch.full((29, 29), 1e300, dtype=torch.float64)}, "cross: .* values that aren't finite"),
        ({"damping": 0.0}, "damping: expected a finite number above 0, found 0.0; pass damping=0.01"),
        ({"damping": -1.0}, "damping: .* found -1.0"),
        ({"damping": float("nan")}, "damping: .* found nan"),
        ({"damping": "0.01"}, "damping: .* found '0.01'"),
        ({"scaling": 0.0}, "scaling: expected a positive finite number, found 0.0"),
        ({"rank": 18}, "rank: expected an integer between 1 and 17"),
        ({"weight": torch.full((17, 29), 1e5), "quant_type": "int8"}, "magnitudes below 65504 for int8"),
    ],
)
@pytest.mark.parametrize("method", ["qera", "srr", "cloq", "aligned"])
def test_what_can_t_work_is_named(method: str, changed: dict[str, object], message: str) -> None:
    arguments = {"weight": weight(), "rank": 4, "bits": 2, **options("aligned"), "method": method, **changed}
    with pytest.raises(ConfigError, match=message):
        factorize(arguments.pop("weight"), arguments.pop("rank"), **arguments)
