"""Quantized matrices against brute force in float64: codes, scales and what is read back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import quantization as ref
from torch import Tensor

from qlora_kit.codecs.blockwise import _search
from qlora_kit.codecs.codebooks import SCHEMES, codebook, scheme
from qlora_kit.codecs.quantized import DYNAMIC_MAP, Quantized, quantize_matrix
from qlora_kit.errors import CodecError

# Whose values are rounded each by itself, to multiples of its block's scale; see ``trellis`` for rotated rows.
TYPES = [name for name, kind in SCHEMES.items() if kind.bits in (2, 3, 4, 8) and not kind.rotated]
FITTED = ["lloyd2", "lloyd3", "signed2", "signed3"]
SHAPES = [(33, 47), (1, 5), (7, 5), (4, 96)]
# One rounding of the scale, one of a product and one of a sum, relative to the block's largest value or range.
ROUNDINGS = 1e-6
every_type = pytest.mark.parametrize("quant_type", TYPES)


def brute_force(weight: Tensor, quant_type: str, blocksize: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kind, size = scheme(quant_type), blocksize or weight.shape[1]
    levels = codebook(quant_type, blocksize=size).double().numpy()
    multipliers = (1.0, 1 / levels.max()) if quant_type in FITTED else (1.0,)
    return ref.round_blocks(weight.double().numpy(), levels, size, kind.scaling, multipliers)


def assert_rounded(weight: Tensor, quant_type: str, blocksize: int | None) -> None:
    """The levels are brute force's but for ties, and nothing reads farther from its value than there."""
    quantized = quantize_matrix(weight, quant_type, blocksize)
    read, codes, lead = brute_force(weight, quant_type, blocksize)
    largest = np.abs(weight.double().numpy()).max(initial=1e-300)
    clear = lead > 1e-5
    assert np.array_equal(quantized.codes.numpy()[clear], codes[clear])
    found = quantized.dequantize()
    assert found.shape == weight.shape
    assert found.dtype == torch.float32
    exact = weight.double().numpy()
    np.testing.assert_allclose(
        np.abs(found.double().numpy() - exact), np.abs(read - exact), rtol=0, atol=2 * ROUNDINGS * largest
    )


@pytest.mark.slow
@pytest.mark.parametrize("blocksize", [32, 64, 4096, None])
@pytest.mark.parametrize("shape", SHAPES)
@every_type
def test_codes_and_values_are_those_of_brute_force(
    quant_type: str, shape: tuple[int, int], blocksize: int | None
) -> None:
    assert_rounded(torch.randn(shape), quant_type, blocksize)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_type
def test_values_of_half_precision(quant_type: str, dtype: torch.dtype) -> None:
    """Whose few bits put many values on ties, and several largest in a block."""
    weight = torch.randn(33, 47).to(dtype)
    assert_rounded(weight.float(), quant_type, 64)
    halves, floats = quantize_matrix(weight, quant_type), quantize_matrix(weight.float(), quant_type)
    assert torch.equal(halves.dequantize(), floats.dequantize())


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e18])
@every_type
def test_weights_of_any_magnitude_are_rounded_alike(quant_type: str, scale: float) -> None:
    assert_rounded(torch.randn(5, 47) * scale, quant_type, 64)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("quant_type", [name for name in TYPES if name not in FITTED])
def test_weights_of_extreme_magnitude(quant_type: str, scale: float) -> None:
    assert_rounded(torch.randn(5, 47) * scale, quant_type, 64)


@every_type
def test_blocks_of_zeros_are_zeros(quant_type: str) -> None:
    """All zero, between others, and in the short last block; whatever levels the table has."""
    for double_quant in (False, True):
        none = quantize_matrix(torch.zeros(3, 43), quant_type, 64, double_quant=double_quant)
        assert not none.dequantize().any()
    weight = torch.randn(5, 64)
    weight[2] = 0
    weight[4, 5:] = 0
    assert not quantize_matrix(weight, quant_type).dequantize()[2].any()
    assert not quantize_matrix(weight.flatten()[None, : 4 * 64 + 5], quant_type, 64).dequantize()[0, 128:192].any()
    tail = torch.cat([torch.randn(64), torch.zeros(7)])[None]
    assert not quantize_matrix(tail, quant_type).dequantize()[0, 64:].any()


@every_type
def test_blocks_of_one_value_are_met(quant_type: str) -> None:
    weight = torch.tensor([[0.3], [-2.0], [0.0]])
    torch.testing.assert_close(quantize_matrix(weight, quant_type, 1).dequantize(), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("blocksize", [32, 64, 256, None])
@pytest.mark.parametrize("quant_type", [*FITTED, "nf2", "nf3", "nf4"])
def test_quantizing_what_was_read_reads_the_same(quant_type: str, blocksize: int | None) -> None:
    read = quantize_matrix(torch.randn(33, 96), quant_type, blocksize).dequantize()
    again = quantize_matrix(read, quant_type, blocksize).dequantize()
    # A multiplier and the level that it undoes are rounded; nothing of the size of a step.
    torch.testing.assert_close(again, read, rtol=1e-6, atol=0)


@every_type
def test_quantizing_is_deterministic_and_leaves_its_input(quant_type: str) -> None:
    weight = torch.randn(33, 47)
    before = weight.clone()
    first, second = quantize_matrix(weight, quant_type), quantize_matrix(weight, quant_type)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)
    assert torch.equal(weight, before)


@every_type
def test_layout_in_memory_does_not_matter(quant_type: str) -> None:
    weight = torch.randn(47, 33)
    turned, copied = quantize_matrix(weight.t(), quant_type), quantize_matrix(weight.t().contiguous(), quant_type)
    assert torch.equal(turned.codes, copied.codes)
    assert torch.equal(turned.dequantize(), copied.dequantize())


def scale_bound(stored: np.ndarray) -> np.ndarray:
    """Half the widest step of the dynamic type, times what the scales of a run of 256 are at most off their mean."""
    off = np.abs(stored - stored.mean())
    runs = np.arange(stored.size) // 256
    widest = np.diff(ref.dynamic_levels()).max()
    return np.array([off[runs == run].max() for run in runs]) * widest / 2


@pytest.mark.parametrize("shape", [(33, 47), (40, 640)])
@every_type
def test_double_quantization_moves_scales_by_at_most_half_a_step(quant_type: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    plain, double = quantize_matrix(weight, quant_type), quantize_matrix(weight, quant_type, double_quant=True)
    assert double.double_quant
    assert not plain.double_quant
    assert torch.equal(double.codes, plain.codes)
    moved = 0.0
    for name in ("scales", "shifts"):
        exact, found = getattr(plain, name), getattr(double, name)
        assert (exact is None) == (found is None)
        if exact is not None:
            off = np.abs(found.double().numpy() - exact.double().numpy())
            bound = scale_bound(exact.double().numpy())
            assert (off <= bound + 1e-6).all()  # float32 rounding of scales up to about 8
            moved += bound.max() + 1e-6
    # A level is at most 1 in magnitude, so a value moves by no more than its scale and its shift do.
    assert (double.dequantize() - plain.dequantize()).abs().max().item() <= moved + 1e-6


def test_what_is_stored_of_scales() -> None:
    def bytes_of(quantized: Quantized) -> int:
        return sum(tensor.nbytes for tensor in quantized.tensors())

    weight = torch.randn(64, 640)  # 640 blocks of 64, so 3 runs of 256
    assert bytes_of(quantize_matrix(weight, "nf2")) == 640 * 4
    assert bytes_of(quantize_matrix(weight, "affine2")) == 2 * 640 * 4
    assert bytes_of(quantize_matrix(weight, "nf2", double_quant=True)) == 640 + 3 * 4 + 4
    assert bytes_of(quantize_matrix(weight, "affine2", double_quant=True)) == 2 * (640 + 3 * 4 + 4)
    assert bytes_of(quantize_matrix(weight, "int8")) == 64 * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_rounds_rows_to_127_steps(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape)
    weight[-1] *= 0 if shape[0] > 1 else 1
    quantized = quantize_matrix(weight, "int8")
    assert quantized.codes.dtype == torch.int8
    assert (quantized.bits, quantized.blocksize) == (8, None)
    half = weight.half().double().numpy()  # what bitsandbytes quantizes
    largest = np.abs(half).max(axis=1)
    read = quantized.dequantize().double().numpy()
    np.testing.assert_allclose(read, ref.read_int8(quantized.codes.numpy(), largest), rtol=1e-6)
    # Half a step; and where the float32 product is on a tie, its rounding.
    assert (np.abs(read - half) <= largest[:, None] / 254 * (1 + 1e-5)).all()


def test_int8_refuses_what_float16_cannot_hold() -> None:
    with pytest.raises(CodecError, match=r"expected magnitudes below 65504 for int8, found 7e\+04"):
        quantize_matrix(torch.full((2, 2), 7e4), "int8")


def test_the_dynamic_type_is_its_decades() -> None:
    assert len(DYNAMIC_MAP) == 256
    np.testing.assert_allclose(DYNAMIC_MAP, ref.dynamic_levels(), rtol=1e-6)  # made in float32


def searched(levels: tuple[float, ...]) -> Tensor:
    """Levels, midpoints, the floats to both sides of these, the ends, and values in between."""
    table = torch.tensor(levels).sort().values
    midpoints = (table[1:] + table[:-1]) / 2
    marks = torch.cat([table, midpoints, torch.tensor([-1.0, -0.0, 0.0, 1.0, 1e-38, -1e-38])])
    above, below = (torch.nextafter(marks, torch.tensor(end)) for end in (2.0, -2.0))
    small = torch.rand(20_000) * 2 - 1
    values = torch.cat([marks, above, below, small, small**5 * 1e-3, torch.linspace(-1, 1, 9973)])
    return values.clamp(-1, 1)


@pytest.mark.parametrize("blocksize", [1, 2, 64, 4096])
@pytest.mark.parametrize("quant_type", [*(name for name, kind in SCHEMES.items() if not kind.rotated), "dynamic"])
@pytest.mark.slow
def test_the_search_by_bins_is_the_binary_search(quant_type: str, blocksize: int) -> None:
    levels = DYNAMIC_MAP if quant_type == "dynamic" else scheme(quant_type).table(blocksize)
    values = searched(levels)
    table, order = torch.tensor(levels).sort(stable=True)
    expected = order[torch.bucketize(values, (table[1:] + table[:-1]) / 2)]
    assert torch.equal(_search(values, levels).long(), expected)


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    quant_type=st.sampled_from(TYPES),
    rows=st.integers(1, 6),
    columns=st.integers(1, 40),
    blocksize=st.one_of(st.none(), st.sampled_from([2, 3, 16, 64])),
    offset=st.sampled_from([0.0, 0.5, -3.0]),
    grid=st.sampled_from([0.0, 0.25]),
    seed=st.integers(0, 10_000),
)
def test_any_matrix_is_rounded_as_by_brute_force(
    quant_type: str, rows: int, columns: int, blocksize: int | None, offset: float, grid: float, seed: int
) -> None:
    """Lopsided blocks, blocks of one sign, blocks of equal values and of ties (on a grid) among them."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + offset
    assert_rounded((weight / grid).round() * grid if grid else weight, quant_type, blocksize)
