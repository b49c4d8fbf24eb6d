"""Scales searched per block: never worse than the largest magnitude, near the best of all, exact where they can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference.starts import damped, least_block_error
from torch import Tensor

from loftq import factorize
from loftq.methods.metric import Metric
from loftq.methods.quantizers import quantizer_for
from loftq.methods.rounding import round_by_search, round_with_feedback
from qlora_kit.codecs.codebooks import SCHEMES, scheme
from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError

TYPES = ["nf2", "nf4", "fp4", "uniform2", "uniform3", "uniform8", "affine2", "affine4", "lloyd2", "lloyd3", "signed2"]
KINDS = {"absmax": "uniform2", "signed": "signed2", "range": "affine2"}


def weight(shape: tuple[int, int] = (6, 29), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def squares(width: int = 29, seed: int = 0) -> Tensor:
    """Mean squares of inputs, 1e4 apart."""
    generator = torch.Generator().manual_seed(50 + seed)
    return torch.logspace(-2, 2, width)[torch.randperm(width, generator=generator)]


def troubled(name: str) -> Tensor:
    full = weight()
    if name == "zeros":
        full.view(-1)[:140] = 0
    elif name == "outliers":
        full[1, 3], full[4, 9] = 3.0, -40.0
    elif name == "one value":
        full[:3] = 0.3
        full[3:] = -0.2
    elif name == "nearly one value":
        full = 1 + full * 1e-5
    elif name == "one sign":
        full = full.abs() + 0.01
    return full


TROUBLES = ["none", "zeros", "outliers", "one value", "nearly one value", "one sign"]


def block_errors(full: Tensor, found: Quantized, weights: np.ndarray) -> np.ndarray:
    """Each block's sum of weighted squared errors, in float64."""
    flat = ((full.double() - found.dequantize().double()).numpy() ** 2 * weights).ravel()
    size = found.blocksize or full.shape[1]
    return np.array([flat[begin : begin + size].sum() for begin in range(0, flat.size, size)])


@pytest.mark.parametrize("trouble", TROUBLES)
@pytest.mark.parametrize("blocksize", [1, 8, 64, "row"])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.slow
def test_no_block_has_more_weighted_error_than_unsearched(quant_type: str, blocksize: int | str, trouble: str) -> None:
    full, quantizer = troubled(trouble), quantizer_for(quant_type=quant_type, blocksize=blocksize)
    # A block that the search leaves as it was may round differently in the last digit of its largest value.
    digit = (3e-7 * float(full.abs().max())) ** 2
    for metric, weights in (
        (Metric(), np.ones(29)),
        (Metric.of(squares()), np.diag(damped(squares().numpy()))),
    ):
        searched = block_errors(full, round_by_search(full, quantizer, metric), weights)
        plain = block_errors(full, quantizer(full), weights)
        assert (searched <= plain * (1 + 1e-5) + digit * weights.sum()).all()


@pytest.mark.parametrize("blocksize", [2, 8, "row"])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.slow
def test_scales_in_8_bits_have_no_more_error_in_all_than_unsearched(quant_type: str, blocksize: int | str) -> None:
    """A small matrix has few scales and its 8 bits fit them by luck: there the search may lose what it found."""
    quantizer = quantizer_for(quant_type=quant_type, blocksize=blocksize, double_quant=True)
    weights = np.diag(damped(squares().numpy()))
    for seed in range(4):
        full = weight((5, 29), seed=seed)
        full[1, 1] = 2.0
        found = round_by_search(full, quantizer, Metric.of(squares()))
        assert found.double_quant
        plain = block_errors(full, quantizer(full), weights).sum()
        assert block_errors(full, found, weights).sum() <= plain * (1 + 1e-5)


@pytest.mark.parametrize(
    ("quant_type", "blocksize", "most"),
    # What the search may leave above the least of a dense grid, over all blocks. Two dimensions, and small blocks
    # with as many levels as values, have many local optima.
    [
        ("nf2", 16, 1.001),
        ("uniform2", 8, 1.001),
        ("uniform3", 32, 1.001),
        ("lloyd2", 16, 1.001),
        ("lloyd3", 32, 1.001),
        ("signed2", 32, 1.005),
        ("signed3", 32, 1.02),
        ("nf4", 32, 1.08),
        ("fp4", 32, 1.02),
        ("affine2", 32, 1.03),
        ("affine4", 32, 1.05),
    ],
)
@pytest.mark.slow
def test_comes_near_the_best_of_all_scales(quant_type: str, blocksize: int, most: float) -> None:
    """The last block is short: what fills it up doesn't count."""
    quantizer, got, best = quantizer_for(quant_type=quant_type, blocksize=blocksize), 0.0, 0.0
    levels = np.array(scheme(quant_type).table(blocksize))
    for seed in range(3):
        full, given = weight((3, 29), seed=seed), squares(seed=seed)
        weights = np.diag(damped(given.numpy()))
        got += block_errors(full, round_by_search(full, quantizer, Metric.of(given)), weights).sum()
        flat, each = full.double().numpy().ravel(), np.tile(weights, 3)
        for begin in range(0, flat.size, blocksize):
            part = slice(begin, begin + blocksize)
            best += least_block_error(flat[part], each[part], levels, scheme(quant_type).scaling)
    assert 1 - 2e-3 < got / best < most  # the grid and its refit miss the least of all by as much


@pytest.mark.slow
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", SCHEMES)
def test_blocks_of_zeros_read_as_zeros(quant_type: str, double_quant: bool) -> None:
    """Also in tables without a 0; and their scale doesn't stand out among the others'."""
    full = weight()
    full[3:5] = 0
    quantizer = quantizer_for(quant_type=quant_type, blocksize="row", double_quant=double_quant)
    for found in (
        round_by_search(full, quantizer, Metric.of(squares())),
        round_with_feedback(full, quantizer, Metric.of(squares().diag())),
    ):
        # The 8-bit values are a hundredth apart near the ends, of scales that lie 0.2 from their mean at most.
        least = 2e-3 if double_quant else 0.0
        assert found.scales[3:5].abs().max() <= least
        assert found.dequantize()[3:5].abs().max() <= least


@pytest.mark.parametrize("quant_type", [name for name, kind in SCHEMES.items() if not kind.rotated])
@pytest.mark.slow
def test_blocks_of_one_value_are_met(quant_type: str) -> None:
    full = torch.tensor([[0.3, -0.2, 0.0, 7e-5]] * 2).repeat_interleave(8, dim=1)
    quantizer = quantizer_for(quant_type=quant_type, blocksize=8)
    found = round_by_search(full, quantizer, Metric.of(squares(32)))
    # Some rounding in float32 of a level, the scale and their product.
    torch.testing.assert_close(found.dequantize(), full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quant_type", SCHEMES)
def test_a_single_value_is_met(quant_type: str) -> None:
    full = torch.tensor([[-0.37]])
    found = round_by_search(full, quantizer_for(quant_type=quant_type), Metric())
    torch.testing.assert_close(found.dequantize(), full, rtol=1e-6, atol=0)


@pytest.mark.parametrize("quant_type", KINDS.values())
def test_an_input_that_is_all_that_matters_is_met(quant_type: str) -> None:
    """With one column's mean square 1e9 times the others', each row's scale is fitted to that one value."""
    full, given = weight(), torch.ones(29)
    given[11] = 1e9
    found = round_by_search(full, quantizer_for(quant_type=quant_type, blocksize="row"), Metric.of(given, damping=1e-9))
    plain = quantizer_for(quant_type=quant_type, blocksize="row")(full)
    errors = [(full - one.dequantize())[:, 11].abs().max() for one in (found, plain)]
    assert errors[0] < 1e-3 * errors[1]


@pytest.mark.parametrize("quant_type", KINDS.values())
def test_units_of_weights_and_inputs_don_t_matter(quant_type: str) -> None:
    """Powers of two scale exactly, over all that float32's squares can't hold."""
    quantizer = quantizer_for(quant_type=quant_type, blocksize=8)
    base = round_by_search(weight(), quantizer, Metric.of(squares()))
    for units, moments in ((2.0**-70, 1.0), (2.0**70, 1.0), (1.0, 2.0**-70), (1.0, 2.0**70)):
        other = round_by_search(weight() * units, quantizer, Metric.of(squares() * moments))
        assert torch.equal(other.codes, base.codes)
        assert torch.equal(other.scales, base.scales * units)


def test_a_full_metric_searches_by_its_diagonal() -> None:
    rows = torch.randn(60, 29, generator=torch.Generator().manual_seed(3)) * squares().sqrt()
    moments, quantizer = rows.T @ rows / 60, quantizer_for(quant_type="nf4", blocksize=16)
    first, second = (round_by_search(weight(), quantizer, Metric.of(moments, diagonal=d)) for d in (False, True))
    # The triangle's rows give the diagonal back with float32's rounding.
    torch.testing.assert_close(first.scales, second.scales, rtol=1e-5, atol=0)
    assert first.exact_scales is None, "the codes aren't the nearest to other scales"


def test_more_blocks_than_are_searched_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer, metric = quantizer_for(quant_type="affine3", blocksize=16), Metric.of(squares())
    whole = round_by_search(weight(), quantizer, metric)
    monkeypatch.setattr("loftq.methods.rounding._CHUNK", 40)
    parts = round_by_search(weight(), quantizer, metric)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)


def test_int8_keeps_the_scales_of_its_rows() -> None:
    quantizer = quantizer_for(quant_type="int8")
    found, plain = round_by_search(weight(), quantizer, Metric.of(squares())), quantizer(weight())
    assert torch.equal(found.codes, plain.codes)
    assert torch.equal(found.scales, plain.scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["loftq", "qera", "cloq"])
def test_weights_that_aren_t_finite_are_refused(method: str, value: float) -> None:
    full = weight()
    full[2, 2] = value
    with pytest.raises(ConfigError, match=r"^weight: expected finite values, found 1 NaN or infinite of 174"):
        factorize(full, 2, method=method, statistics=squares(), scale_search=True)
