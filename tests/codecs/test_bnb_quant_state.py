"""Codes and scales are, bit for bit, those that bitsandbytes' own ``quantize_4bit`` stores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from four_bit_linears import STORAGES, storage_fits
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.bnb import linear_of_codes, quantize_linear
from qlora_kit.codecs.codebooks import codebook
from qlora_kit.codecs.quantized import BNB_BLOCKSIZES, Quantizer, quantize_matrix
from qlora_kit.errors import CodecError
from qlora_kit.training.preparation.quantize import linear_holding

# Rows and numbers of blocks that are whole and not, odd counts of codes, more than 256 scales.
SHAPES = [(32, 64), (37, 96), (33, 31), (5, 7), (1, 1), (3, 21), (40, 513)]
both_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
plain_and_double = pytest.mark.parametrize("double_quant", [False, True])


def matrices(shape: tuple[int, int], quant_type: str) -> dict[str, Tensor]:
    weight = torch.randn(shape)
    half = weight.clone()
    half.view(-1)[weight.numel() // 2 :] = 0
    levels = codebook(quant_type).sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    beside = [middles.nextafter(torch.tensor(end)) for end in (9.0, -9.0)]
    ties = torch.cat([levels, middles, *beside])
    return {
        "normal": weight,
        "rows of many sizes": weight * torch.randn(shape[0], 1).mul(3).exp(),
        "a half of zeros, the short last block too": half,
        "zeros": torch.zeros(shape),
        "one value": torch.full(shape, -2.5),
        "ties": ties[torch.randint(len(ties), shape)],
        "tiny": weight * 1e-30,
        "below bitsandbytes' least scale": weight * 1e-39,
    }


def assert_equal(module: Any, data: Tensor, state: QuantState) -> None:
    found = module.weight.quant_state
    assert found is module.quant_state
    assert (module.weight.dtype, module.weight.shape) == (data.dtype, data.shape)
    assert torch.equal(module.weight.data.view(torch.uint8), data.view(torch.uint8))
    assert_same_state(found, state)


def assert_same_state(found: Any, state: Any) -> None:
    assert set(vars(found)) == set(vars(state))
    for name, expected in vars(state).items():
        ours = getattr(found, name)
        if isinstance(expected, Tensor):
            assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), name
            assert torch.equal(ours, expected), name
        elif isinstance(expected, QuantState):
            assert_same_state(ours, expected)
        elif name not in ("shape", "dtype") or expected is not None:
            assert ours == expected, name


@pytest.mark.slow
@plain_and_double
@both_types
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_stored_is_bitsandbytes(shape: tuple[int, int], quant_type: str, double_quant: bool) -> None:
    linear, options = nn.Linear(shape[1], shape[0]), {"quant_type": quant_type}
    for weight in matrices(shape, quant_type).values():
        for blocksize in (32, 64, 4096):
            expected = quantize_4bit(weight, blocksize=blocksize, compress_statistics=double_quant, **options)
            assert_equal(
                quantize_linear(linear, weight, blocksize=blocksize, double_quant=double_quant, **options), *expected
            )
            quantized = Quantizer(quant_type, blocksize, double_quant)(weight)
            assert_equal(linear_holding(linear, quantized), *expected)


@plain_and_double
@both_types
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_writing_stores_what_bitsandbytes_would(shape: tuple[int, int], quant_type: str, double_quant: bool) -> None:
    linear = nn.Linear(shape[1], shape[0])
    module = quantize_linear(linear, linear.weight, quant_type=quant_type, double_quant=double_quant)
    for weight in matrices(shape, quant_type).values():
        codec_for(module).write_(module, weight)
        expected = quantize_4bit(weight, blocksize=64, compress_statistics=double_quant, quant_type=quant_type)
        assert_equal(module, *expected)


@pytest.mark.parametrize("blocksize", BNB_BLOCKSIZES)
@both_types
def test_every_blocksize(quant_type: str, blocksize: int) -> None:
    weight = torch.randn(40, 513)
    expected = quantize_4bit(weight, blocksize=blocksize, compress_statistics=True, quant_type=quant_type)
    linear = nn.Linear(513, 40)
    module = quantize_linear(linear, weight, quant_type=quant_type, blocksize=blocksize, double_quant=True)
    assert_equal(module, *expected)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(32, 64), (37, 96), (5, 7)])
def test_every_dtype(shape: tuple[int, int], dtype: torch.dtype, storage: torch.dtype) -> None:
    if not storage_fits(*shape, storage):
        pytest.skip(f"{shape} nibbles aren't a whole number of {storage} values")
    weight = torch.randn(shape, dtype=dtype)
    expected = quantize_4bit(weight.float(), quant_type="nf4", compress_statistics=True, quant_storage=storage)
    linear = nn.Linear(shape[1], shape[0])
    assert_equal(quantize_linear(linear, weight, double_quant=True, quant_storage=storage), *expected)


@plain_and_double
def test_codes_chosen_elsewhere_are_stored_as_they_are(double_quant: bool) -> None:
    matrix = torch.randn(37, 96)
    chosen = quantize_matrix(matrix, "nf4", 64, double_quant=double_quant)
    chosen = type(chosen)("nf4", chosen.codes.flip(0), chosen.stored_scales, None, 64, None)
    module = linear_holding(nn.Linear(96, 37), chosen)
    found = codec_for(module).quantized(module)
    assert found is not None
    assert torch.equal(found.codes, chosen.codes)
    assert all(torch.equal(*pair) for pair in zip(found.tensors(), chosen.tensors(), strict=True))
    assert torch.equal(codec_for(module).read(module), chosen.dequantize())


def test_nothing_is_quantized_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that were found are put where they belong; bitsandbytes is asked for the scales' own codes alone."""
    from bitsandbytes import functional

    from qlora_kit.codecs.bnb import four_bit, int8

    kinds = (("nf4", 64, True), ("fp4", 32, False), ("int8", None, False))
    found = [Quantizer(*kind)(torch.randn(32, 64)) for kind in kinds]
    for module in (four_bit, int8):
        monkeypatch.setattr(module, "quantize_matrix", None)
    for name in ("quantize_4bit", "int8_vectorwise_quant"):
        monkeypatch.setattr(functional, name, None)
    for quantized in found:
        module = linear_holding(nn.Linear(64, 32), quantized)
        codec_for(module).take_(module, quantized)
        codes = codec_for(module).quantized(module)
        assert codes is not None
        assert torch.equal(codes.codes, quantized.codes)


@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 48), ("nf3", 64)])
def test_what_bitsandbytes_does_not_know_is_refused(quant_type: str, blocksize: int) -> None:
    linear, quantized = nn.Linear(96, 4), quantize_matrix(torch.randn(4, 96), quant_type, blocksize)
    with pytest.raises(CodecError, match=rf"expected nf4 or fp4 in blocks of one of .*found {quant_type} in blocks of"):
        linear_of_codes(linear, quantized)


def test_scales_whose_sum_overflows_are_refused() -> None:
    module = quantize_linear(nn.Linear(64, 32), torch.randn(32, 64), double_quant=True)
    before = codec_for(module).read(module)
    with pytest.raises(CodecError, match="scales whose sum float32 can hold"):
        codec_for(module).write_(module, torch.full((32, 64), 3e38))
    assert torch.equal(codec_for(module).read(module), before)
