"""Tables, codes and scales against an independent reference and against bitsandbytes' codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit
from reference import quantization as ref
from torch import Tensor

from qlora_kit.codecs.blockwise import dequantize, quantize
from qlora_kit.codecs.codebooks import SCHEMES, codebook
from qlora_kit.errors import CodecError


def stock_codes(weight: Tensor, quant_type: str, blocksize: int) -> tuple[Tensor, Tensor]:
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type=quant_type)
    both = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 0xF], dim=1)
    return both.reshape(-1)[: weight.numel()].reshape(weight.shape), state.absmax


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_normal_float_tables_are_the_quantiles(bits: int) -> None:
    # bitsandbytes' published constants carry float32 rounding of the quantiles, about 1e-7.
    np.testing.assert_allclose(codebook(f"nf{bits}").double().numpy(), ref.normal_float(bits), atol=2e-7)


def test_four_bit_tables_are_bitsandbytes() -> None:
    for name in ("nf4", "fp4"):
        assert torch.equal(codebook(name), get_4bit_type(name, "cpu"))
    np.testing.assert_allclose(codebook("fp4").double().numpy(), ref.float4(), atol=1e-7)


def test_unknown_table_lists_the_known() -> None:
    with pytest.raises(CodecError, match=r"quant_type: expected one of \['affine2', .*found 'nf5'"):
        codebook("nf5")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((37, 96), 64), ((33, 31), 32), ((5, 7), 4096), ((8, 512), 256)])
def test_codes_equal_bitsandbytes(quant_type: str, shape: tuple[int, int], blocksize: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(shape).to(dtype)
        weight[0] = 0
        weight[-1] = 0
        codes, absmax = quantize(weight, codebook(quant_type), blocksize)
        expected, scales = stock_codes(weight, quant_type, blocksize)
        assert torch.equal(codes, expected)
        # bitsandbytes stores 1e-38 for a short last block of zeros, which reads as zero all the same.
        torch.testing.assert_close(absmax, scales, rtol=0, atol=1e-37)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_ties_go_where_bitsandbytes_sends_them(quant_type: str) -> None:
    levels = codebook(quant_type).sort().values
    midpoints = (levels[1:] + levels[:-1]) / 2
    weight = torch.zeros(4, 64)
    weight[0, :15], weight[0, 15] = midpoints, 1.0
    weight[1, :15], weight[1, 15] = -midpoints, -1.0
    weight[2, :15], weight[2, 15] = torch.nextafter(midpoints, torch.tensor(2.0)), 1.0
    codes, _ = quantize(weight, codebook(quant_type), 64)
    assert torch.equal(codes, stock_codes(weight, quant_type, 64)[0])


@pytest.mark.parametrize("quant_type", sorted(name for name, kind in SCHEMES.items() if kind.scaling == "absmax"))
def test_every_value_goes_to_its_nearest_level(quant_type: str) -> None:
    weight, table = torch.randn(9, 50), codebook(quant_type)
    codes, absmax = quantize(weight, table, 64)
    error = (dequantize(codes, table, absmax, 64) - weight).abs().double().numpy()
    expected = ref.nearest_error(weight.numpy(), table.double().numpy(), 64)
    np.testing.assert_allclose(error, expected, atol=2e-6)  # float32 rounding of values up to about 4


@pytest.mark.parametrize("quant_type", ["nf2", "nf3", "nf4", "fp4", "uniform4"])
def test_quantizing_what_was_read_changes_nothing(quant_type: str) -> None:
    table = codebook(quant_type)
    codes, absmax = quantize(torch.randn(7, 100), table, 64)
    weight = dequantize(codes, table, absmax, 64)
    again, absmax_again = quantize(weight, table, 64)
    assert torch.equal(absmax_again, absmax)
    assert torch.equal(dequantize(again, table, absmax_again, 64), weight)
    if quant_type != "fp4":  # FP4 has two codes for zero, and a value that was rounded to it is on their tie
        assert torch.equal(again, codes)
