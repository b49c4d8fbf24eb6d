"""The low-bit tables: fitted levels against a fit of sampled blocks, and what each table leaves of normal weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from reference import quantization as ref

from qlora_kit.codecs.codebooks import SCHEMES, STORED_TYPES, codebook, scheme
from qlora_kit.codecs.packed import PackedLinear
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.config.loftq import DEFAULT_TYPES
from qlora_kit.errors import CodecError

FITTED = ["lloyd2", "lloyd3", "signed2", "signed3"]
# ||W - read|| / ||W|| of normal weights in blocks of 64.
LEFT = {
    "nf2": 0.563,
    "uniform2": 0.506,
    "affine2": 0.450,
    "lloyd2": 0.344,
    "signed2": 0.339,
    "nf3": 0.202,
    "uniform3": 0.215,
    "affine3": 0.192,
    "lloyd3": 0.176,
    "signed3": 0.170,
}


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("quant_type", FITTED)
@pytest.mark.slow
def test_fitted_levels_are_the_lloyd_max_levels_of_normal_blocks(quant_type: str, blocksize: int) -> None:
    kind = scheme(quant_type)
    points, weights = ref.normal_sample(blocksize, kind.scaling)
    expected = ref.lloyd_max(points, weights, 2**kind.bits, kind.scaling == "absmax")
    found = codebook(quant_type, blocksize=blocksize).double().numpy()
    # The inner levels of "signed3" can move together by 0.01 and lose less than 0.1% of the least error.
    np.testing.assert_allclose(found, expected, atol=0.011 if quant_type == "signed3" else 0.004)
    least = ref.expected_error(points, weights, expected)
    assert ref.expected_error(points, weights, found) < least * (1 + 1e-3)


@pytest.mark.parametrize("quant_type", FITTED)
@pytest.mark.slow
def test_moving_a_fitted_level_does_not_lower_the_expected_error(quant_type: str) -> None:
    points, weights = ref.normal_sample(64, scheme(quant_type).scaling)
    levels = codebook(quant_type).double().numpy()
    error = ref.expected_error(points, weights, levels)
    for place in range(len(levels)):
        for step in (-0.02, -0.006, 0.006, 0.02):
            moved = levels.copy()
            moved[place] += step
            # Each level is at its cell's mean up to 0.0005 of rounding and 0.002 of the sample: less than half a step.
            assert ref.expected_error(points, weights, moved) > error, (place, step)


@pytest.mark.slow
@pytest.mark.parametrize("blocksize", [1, 2, 32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", FITTED)
def test_fitted_tables_ascend_inside_their_range(quant_type: str, blocksize: int) -> None:
    table = codebook(quant_type, blocksize=blocksize)
    assert table.dtype == torch.float32
    assert table.shape == (2 ** scheme(quant_type).bits,)
    assert (table.diff() >= 0).all()
    assert table.abs().max() <= 1
    if blocksize > 1:
        assert (table.diff() > 0).all()


@pytest.mark.parametrize("quant_type", ["lloyd2", "lloyd3", *(f"uniform{bits}" for bits in range(2, 9))])
@pytest.mark.parametrize("blocksize", [1, 32, 64, 256])
def test_symmetric_tables_are_symmetric(quant_type: str, blocksize: int) -> None:
    table = codebook(quant_type, blocksize=blocksize)
    # Even steps are sums of rounded multiples; fitted levels are rounded decimals of equal magnitude.
    torch.testing.assert_close(table, -table.flip(0), rtol=0, atol=0 if quant_type.startswith("lloyd") else 1e-7)


@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("quant_type", FITTED)
@pytest.mark.slow
def test_multipliers_bring_the_top_level_to_the_largest_value(quant_type: str, blocksize: int) -> None:
    plain, larger = scheme(quant_type).multipliers(blocksize)
    assert plain == 1
    assert larger * max(scheme(quant_type).table(blocksize)) == pytest.approx(1, abs=1e-12)


def test_tables_that_meet_their_blocks_largest_value_have_no_multipliers() -> None:
    for name, kind in SCHEMES.items():
        if kind.rotated:  # scales are fitted, and meet no value
            continue
        if name not in FITTED:
            assert kind.multipliers(64) == (1.0,)
            assert max(kind.table()) == 1


@pytest.mark.parametrize("quant_type", LEFT)
def test_what_is_left_of_normal_weights(quant_type: str) -> None:
    weight = torch.randn(4000, 64)
    left = ((quantize_matrix(weight, quant_type).dequantize() - weight).norm() / weight.norm()).item()
    assert left == pytest.approx(LEFT[quant_type], abs=0.002)  # 4000 blocks: below 0.0005 from draw to draw


@pytest.mark.parametrize("blocksize", [32, 64, 256])
@pytest.mark.parametrize("bits", [2, 3])
def test_fitted_tables_leave_the_least(bits: int, blocksize: int) -> None:
    weight = torch.randn(1000, 256)
    families = ["signed", "lloyd", "affine", "nf", "uniform"]
    left = {}
    for family in families:
        read = quantize_matrix(weight, f"{family}{bits}", blocksize).dequantize()
        left[family] = (read - weight).square().sum().item()
    assert sorted(left, key=lambda family: left[family])[:2] == ["signed", "lloyd"]


def test_unknown_names_list_the_known_and_the_closest() -> None:
    with pytest.raises(CodecError, match=r"quant_type: expected one of \['affine2', .*found 'lloyd4'.*closest.*lloyd3"):
        scheme("lloyd4")
    with pytest.raises(CodecError, match="found 'signed8'"):
        quantize_matrix(torch.ones(2, 2), "signed8")


@pytest.mark.parametrize("quant_type", STORED_TYPES)
def test_names_that_a_config_takes_exist_and_end_in_their_bits(quant_type: str) -> None:
    assert quant_type == "int8" or quant_type in SCHEMES
    bits = quantize_matrix(torch.ones(2, 2), quant_type).bits
    assert quant_type.endswith(str(bits))


def test_defaults_are_known_types_of_their_bits() -> None:
    for bits, quant_type in DEFAULT_TYPES.items():
        assert quant_type in STORED_TYPES
        assert quant_type.endswith(str(bits))


def test_what_is_stored_is_what_can_be_packed() -> None:
    """A config or a merge that took ``uniform5`` would end in a layer that can't hold it."""
    for name in SCHEMES:
        if name in STORED_TYPES:
            PackedLinear(8, 2, quant_type=name)
        else:
            with pytest.raises(CodecError):
                PackedLinear(8, 2, quant_type=name)
