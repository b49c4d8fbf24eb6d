"""Rounding with error feedback: the codes of the sequential update by the inverse of what is left, and what they gain.

Codes are compared bit for bit. The reference works in float64 with the stored scales; a code could differ where a
goal lies within float32's rounding of a midpoint, some 1e-6 of a scale, which no weight here does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference.starts import brain_surgeon, damped, each_weights, weighted_error
from torch import Tensor

from loftq.methods.metric import Metric
from loftq.methods.quantizers import Quantizer, quantizer_for
from loftq.methods.rounding import round_by_search, round_with_feedback
from qlora_kit.codecs.quantized import Quantized

TYPES = ["nf2", "nf4", "fp4", "signed2", "lloyd3", "affine2", "uniform3", "int8"]


def weight(shape: tuple[int, int] = (17, 29), seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def moments(width: int = 29, seed: int = 0, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(width, width, generator=generator) * torch.logspace(-1, 1, width)
    rows = torch.randn(count, width, generator=generator) @ mixing
    return rows.T @ rows / count


def stored(found: Quantized, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Levels, ascending, their codes, and each weight's scale and shift, in float64."""
    if found.quant_type == "int8":
        levels, codes, blocksize = np.arange(-127, 128) / 127, np.arange(-127, 128), shape[1]
    else:
        table = found.table().double().numpy()
        codes = np.argsort(table, kind="stable")
        levels, blocksize = table[codes], found.blocksize or 0
    scales = each_weights(found.scales.double().numpy(), shape, blocksize)
    shifts = np.zeros(shape) if found.shifts is None else each_weights(found.shifts.double().numpy(), shape, blocksize)
    return levels, codes, scales, shifts


def check(full: Tensor, statistics: Tensor, quantizer: Quantizer, *, search: bool = True) -> None:
    metric, shape = Metric.of(statistics), tuple(full.shape)
    found = round_with_feedback(full, quantizer, metric, search=search)
    scaled = round_by_search(full, quantizer, metric) if search else quantizer(full)
    assert torch.equal(found.scales, scaled.scales), "the scales are fixed beforehand"
    assert found.double_quant == quantizer.double_quant
    levels, codes, scales, shifts = stored(found, shape)
    ranks = brain_surgeon(full.numpy(), damped(statistics.numpy()), levels, scales, shifts)
    # Any code reads as 0 in a block of zeros, and fp4 has two codes for 0.
    same = (found.codes.numpy() == codes[ranks]) | (scales == 0) | (levels[ranks] == 0)
    assert same.all(), f"{(~same).sum()} codes differ"
    read = levels[ranks] * scales + shifts
    # A level, a scale and their product are each rounded to float32.
    np.testing.assert_allclose(found.dequantize(), read, atol=3e-7 * float(full.abs().max()))
    plain = brain_surgeon(full.numpy(), np.eye(shape[1]), levels, scales, shifts)
    assert full.numel() < 20 or (ranks != plain).any(), "nothing was fed back"


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("blocksize", [8, 64, "row", 1000])
@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.slow
def test_codes_are_those_of_the_sequential_update(quant_type: str, blocksize: int | str, search: bool) -> None:
    """29 columns: blocks of 8 and 64 straddle rows, and the last is short."""
    check(weight(), moments(), quantizer_for(quant_type=quant_type, blocksize=blocksize), search=search)


@pytest.mark.parametrize("quant_type", [kind for kind in TYPES if kind != "int8"])
def test_codes_make_up_for_scales_in_8_bits(quant_type: str) -> None:
    check(weight(), moments(), quantizer_for(quant_type=quant_type, blocksize=8, double_quant=True))


@pytest.mark.parametrize("shape", [(1, 5), (9, 2), (3, 128), (2, 129), (2, 300)])
def test_columns_beyond_one_block_of_updates_are_brought_up_to_date(shape: tuple[int, int]) -> None:
    check(weight(shape), moments(shape[1]), quantizer_for(quant_type="nf2", blocksize=32))


def test_few_inputs_and_columns_that_are_always_zero() -> None:
    statistics = moments(count=7)
    statistics[:, [3, 20]] = 0
    statistics[[3, 20]] = 0
    check(weight(), statistics, quantizer_for(quant_type="nf4", blocksize=16))


def test_blocks_of_zeros_stay_zero_and_their_neighbours_aren_t_disturbed() -> None:
    full = weight()
    full[2:5] = 0
    for kind in ("nf4", "uniform3", "affine2", "int8"):
        quantizer = quantizer_for(quant_type=kind, blocksize="row")
        check(full, moments(), quantizer)
        assert not round_with_feedback(full, quantizer, Metric.of(moments())).dequantize()[2:5].any()


@pytest.mark.parametrize("quant_type", TYPES)
@pytest.mark.slow
def test_leaves_less_weighted_error_than_the_nearest_codes(quant_type: str) -> None:
    """Not for every weight: a greedy choice may lose. Over ten it gains a third at least."""
    quantizer, gains = quantizer_for(quant_type=quant_type, blocksize=16), []
    for seed in range(10):
        full, statistics = weight(seed=seed), moments(seed=seed)
        R, metric = damped(statistics.numpy()), Metric.of(statistics)
        fed, plain = round_with_feedback(full, quantizer, metric, search=False), quantizer(full)
        errors = [weighted_error((full - one.dequantize()).numpy(), R) for one in (fed, plain)]
        gains.append(errors[0] / errors[1])
    assert np.mean(gains) < 2 / 3
    assert max(gains) < 1


@pytest.mark.slow
@pytest.mark.parametrize("quant_type", [kind for kind in TYPES if kind != "int8"])
def test_uncorrelated_inputs_leave_nothing_to_feed_back(quant_type: str) -> None:
    quantizer, full = quantizer_for(quant_type=quant_type, blocksize=16), weight()
    diagonal = moments().diagonal().diag()
    assert Metric.of(diagonal).order is not None, "a matrix takes the way through the columns"
    found = round_with_feedback(full, quantizer, Metric.of(diagonal), search=False)
    assert torch.equal(found.codes, quantizer(full).codes)
    searched = round_by_search(full, quantizer, Metric.of(diagonal))
    assert torch.equal(round_with_feedback(full, quantizer, Metric.of(diagonal)).codes, searched.codes)
    for metric in (Metric(), Metric.of(diagonal.diagonal())):
        assert torch.equal(round_with_feedback(full, quantizer, metric, search=False).codes, quantizer(full).codes)


def test_int8_of_uncorrelated_inputs_is_the_nearest_of_255_levels() -> None:
    """bitsandbytes rounds from float16, where one in some hundred weights takes the level next to the nearest."""
    full, diagonal = weight(), moments().diagonal().diag()
    found = round_with_feedback(full, quantizer_for(quant_type="int8"), Metric.of(diagonal))
    steps = found.scales.double().numpy()[:, None] / 127
    np.testing.assert_array_equal(found.codes.numpy(), np.rint(full.double().numpy() / steps).clip(-127, 127))


def test_is_repeatable_and_leaves_the_weight_alone() -> None:
    full, quantizer, metric = weight(), quantizer_for(quant_type="nf4"), Metric.of(moments())
    before = full.clone()
    first, second = (round_with_feedback(full, quantizer, metric) for _ in range(2))
    assert torch.equal(full, before)
    assert torch.equal(first.codes, second.codes)
    assert first.exact_scales is None, "the codes aren't the nearest to other scales"


@pytest.mark.parametrize("quant_type", ["nf4", "affine2", "signed2"])
def test_units_of_weights_and_inputs_don_t_matter(quant_type: str) -> None:
    """Powers of two scale exactly, over all that float32's squares can't hold."""
    quantizer = replace(quantizer_for(quant_type=quant_type), blocksize=16)
    codes = [
        round_with_feedback(weight() * units, quantizer, Metric.of(moments() * squares)).codes
        for units, squares in ((1.0, 1.0), (2.0**-70, 1.0), (2.0**70, 1.0), (1.0, 2.0**-70), (1.0, 2.0**70))
    ]
    assert all(torch.equal(codes[0], other) for other in codes[1:])
