"""Rounding with error feedback along a trellis, against float64 where every path is tried, and as the property it is
for: less error at the layer's output than nearest codes leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import trellis as ref
from torch import Tensor

from loftq import factorize
from loftq.methods import trellis
from loftq.methods.metric import Metric
from loftq.methods.rounding import round_by_search, round_with_feedback
from qlora_kit.codecs.codebooks import SCHEMES, Scheme, codebook, scheme
from qlora_kit.codecs.quantized import Quantized, Quantizer

TYPES = [name for name, kind in SCHEMES.items() if kind.rotated]
every_type = pytest.mark.parametrize("quant_type", TYPES)
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])


def correlated(width: int, tokens: int = 2000) -> Tensor:
    """Second moments of inputs that depend on one another, with some large ones."""
    x = torch.randn(tokens, width) @ (torch.eye(width) + torch.randn(width, width) / width**0.5)
    x[:, ::5] *= 4
    return x.T @ x / tokens


def output_error(quantized: Quantized, weight: Tensor, moments: Tensor) -> float:
    """tr(E R E^T)."""
    error = quantized.dequantize().double() - weight.double()
    return float(((error @ moments.double()) * error).sum())


def damped(moments: Tensor, damping: float) -> np.ndarray:
    exact = moments.double().numpy()
    return exact + damping * np.diag(exact).mean() * np.eye(len(exact))


@pytest.mark.parametrize("width", [1, 5, 12])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("bits", "memory"), [(2, 2), (2, 4), (3, 3), (3, 4), (2, 8)])
def test_codes_and_scales_are_the_references(
    bits: int, memory: int, diagonal: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces of two columns with another in view, so that every path through them can be tried."""
    levels = tuple(torch.randn(2**memory).tolist())
    monkeypatch.setitem(SCHEMES, "tried", Scheme("tried", bits, "fitted", levels))
    monkeypatch.setattr(trellis, "_PIECE", 2)
    monkeypatch.setattr(trellis, "_VIEW", 1)
    moments, weight, damping = correlated(width), torch.randn(6, width), 0.02
    metric = Metric.of(moments, diagonal=diagonal, damping=damping)
    found = round_with_feedback(weight, Quantizer("tried", None), metric)

    turn = ref.rotation(width)
    own = damped(torch.diag(moments.diagonal()) if diagonal else moments, damping)
    turned = turn @ own @ turn.T
    table = codebook("tried").double().numpy()
    piece, view = (2, 1) if memory > bits else (1, 0)
    compared = 0
    for row, codes, scale in zip(weight.double().numpy(), found.codes.tolist(), found.scales.tolist(), strict=True):
        goal = turn @ row
        goal /= np.sqrt((goal**2).mean())
        expected, margin = ref.fed_back(goal, turned, table, bits, piece, view)
        if margin < 1e-4:  # float32 may decide otherwise
            continue
        compared += 1
        assert codes == expected
        read = ref.look_up(np.array([codes]), table, bits)[0]
        assert scale == pytest.approx(ref.fitted_scale(turn @ row, read, turned), rel=1e-4)
    assert compared >= 3


@pytest.mark.parametrize("width", [47, 64, 96])
@plain_and_double
@every_type
def test_less_error_at_the_output_than_nearest_codes_leave(quant_type: str, double_quant: bool, width: int) -> None:
    moments, weight = correlated(width), torch.randn(24, width)
    quantizer = Quantizer(quant_type, 64, double_quant)
    found = round_with_feedback(weight, quantizer, Metric.of(moments))
    plain = output_error(quantizer(weight), weight, moments)
    assert output_error(found, weight, moments) < 0.85 * plain
    assert (found.quant_type, found.blocksize, found.rows, found.double_quant) == (
        quant_type,
        width,
        True,
        double_quant,
    )


@every_type
def test_without_moments_it_is_plain_rounding(quant_type: str) -> None:
    weight, quantizer = torch.randn(9, 40), Quantizer(quant_type, 64, True)
    plain = quantizer(weight)
    for found in (round_with_feedback(weight, quantizer, Metric()), round_by_search(weight, quantizer, Metric())):
        assert torch.equal(found.codes, plain.codes)
        assert torch.equal(found.scales, plain.scales)


@every_type
def test_independent_inputs_alike_leave_about_the_plain_error(quant_type: str) -> None:
    weight, quantizer, moments = torch.randn(24, 96), Quantizer(quant_type, 64), torch.ones(96)
    found = round_with_feedback(weight, quantizer, Metric.of(moments))
    ratio = output_error(found, weight, torch.eye(96)) / output_error(quantizer(weight), weight, torch.eye(96))
    assert ratio < 1.05  # columns are decided with fewer in view


@every_type
def test_rows_of_zeros_and_of_any_magnitude(quant_type: str) -> None:
    moments, weight = correlated(48), torch.randn(6, 48)
    metric, quantizer = Metric.of(moments), Quantizer(quant_type, None)
    alike = round_with_feedback(weight, quantizer, metric)
    magnitudes = torch.tensor([1e-25, 1.0, 1e25, 0.0, 1e-3, 1e3])[:, None]
    found = round_with_feedback(weight * magnitudes, quantizer, metric)
    assert not found.dequantize()[3].any()
    read = torch.where(magnitudes > 0, found.dequantize().double() / magnitudes, 0)
    lost = (read - weight).norm(dim=1)
    expected = (alike.dequantize().double() - weight).norm(dim=1)
    kept = magnitudes[:, 0] > 0
    torch.testing.assert_close(lost[kept], expected[kept], rtol=2e-2, atol=0)


def test_the_triangle_of_rotated_inputs_has_their_moments() -> None:
    moments, turn = correlated(48), ref.rotation(48)
    for statistics, diagonal in ((moments, False), (moments, True), (moments.diagonal(), False)):
        factor = Metric.of(statistics, diagonal=diagonal, damping=0.01).rotated_factor.double().numpy()
        own = moments if statistics.dim() == 2 and not diagonal else torch.diag(moments.diagonal())
        exact = turn @ damped(own, 0.01) @ turn.T
        assert (np.tril(factor, -1) == 0).all()
        assert (np.diag(factor) > 0).all()
        assert np.abs(factor @ factor.T - exact).max() <= 1e-5 * np.abs(exact).max()
        assert np.abs(factor - ref.triangle(exact)).max() <= 1e-5 * np.abs(factor).max()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_trellis_leaves_less_than_single_values_do(bits: int) -> None:
    strong, weight = correlated(96), torch.randn(64, 96)
    # Inputs that depend on one another less: columns of a piece are searched as if they didn't.
    moments = strong / 10 + strong.diagonal().mean() * torch.eye(96)
    errors = [
        output_error(round_with_feedback(weight, Quantizer(f"{kind}{bits}", None), Metric.of(moments)), weight, moments)
        for kind in ("trellis", "rotated")
    ]
    assert errors[0] < 0.85 * errors[1]
    assert scheme(f"trellis{bits}").bits == scheme(f"rotated{bits}").bits == bits


@pytest.mark.parametrize("quant_type", ["trellis2", "rotated3"])
def test_some_rows_tell_what_a_zero_start_leaves(quant_type: str) -> None:
    """Against all rows; these differ in size a hundredfold, and their inputs by as much."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, 400)[torch.randperm(400, generator=draw)]
    weight = torch.randn(400, 96, generator=draw) * sizes[:, None]
    root = torch.randn(96, 96, generator=draw) * torch.logspace(-1, 1, 96)
    given = {"rank": 4, "quant_type": quant_type, "blocksize": "row", "statistics": root @ root.T}
    result = factorize(weight, method="cloq", **given)
    residual = (weight - Quantizer(quant_type, None)(weight).dequantize()).double()
    R = (root @ root.T).double()
    assert result.zero_error == pytest.approx(float(residual.norm() / weight.double().norm()), rel=0.03)
    felt = [torch.trace(m @ R @ m.T) for m in (residual, weight.double())]
    # Of 80 rows so different in size, some 17 count, and what each gives a few inputs.
    assert result.zero_output_error == pytest.approx(float((felt[0] / felt[1]).sqrt()), rel=0.15)
