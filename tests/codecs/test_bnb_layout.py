"""An evaluation forward that repacks 4-bit weights for inference: undone where it happened, prevented elsewhere."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from codes_taken import check_codes_taken
from four_bit_linears import STORAGES, relative, stock
from reference import quantization as ref
from torch import Tensor

from qlora_kit.codecs import codec_for

repacks = pytest.mark.skipif(not has_avx512bf16(), reason="this CPU or build doesn't repack (no AVX512_BF16)")


def repacked(**kwargs: Any) -> tuple[Linear4bit, Tensor]:
    """A module after a stock evaluation forward, and what its weight had been."""
    module = stock(64, 128, **kwargs).eval()
    before = codec_for(module).read(module)
    with torch.no_grad():
        module(torch.randn(1, 128))
    assert module.weight.quant_state.packing_format_for_cpu
    return module, before


@repacks
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_repacked_weight_is_read_and_restored(storage: torch.dtype, double_quant: bool) -> None:
    module, before = repacked(compress_statistics=double_quant, quant_storage=storage)
    codec = codec_for(module)
    garbage = dequantize_4bit(module.weight.data, module.quant_state)
    assert relative(garbage.reshape(before.shape), before) > 1  # the platform's
    stored = module.weight.data.clone()
    weight = codec.read(module)
    assert relative(weight, before) < 2**-8  # scales rounded to bfloat16: half an ulp
    assert torch.equal(module.weight.data, stored)

    with pytest.warns(UserWarning, match="repacked this 4-bit weight for CPU inference.*scales to bfloat16"):
        codec.protect_(module)
    assert torch.equal(codec.read(module), weight)
    assert relative(weight, ref.read_linear4bit(module)) < 1e-6
    assert module.weight.dtype == storage
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codec.protect_(module)
    x = torch.randn(3, 128, requires_grad=True)
    codec.forward(module, x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)  # float32 sums of 64

    fresh = stock(64, 128, quant_storage=storage)
    saved = module.state_dict()
    prefix = "weight."
    stats = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
    fresh.weight = type(fresh.weight).from_prequantized(saved["weight"], stats, device="cpu", module=fresh)
    assert torch.equal(codec.read(fresh), weight)


@repacks
def test_protected_modules_are_never_repacked() -> None:
    module = stock(64, 128).eval()
    codec, x = codec_for(module), torch.randn(1, 128)
    before, bits = codec.read(module), module.weight.data.clone()
    codec.protect_(module)
    with torch.no_grad():
        module(x)
        copy.deepcopy(module)(x)
    assert torch.equal(module.weight.data, bits)
    assert torch.equal(codec.read(module), before)


@repacks
def test_writing_to_a_repacked_weight() -> None:
    module, before = repacked()
    codec = codec_for(module)
    with pytest.warns(UserWarning, match="repacked"):
        codec.write_(module, before)
    assert relative(codec.read(module), before) < 0.1
    assert relative(codec.read(module), ref.read_linear4bit(module)) < 1e-6


@repacks
@pytest.mark.parametrize("out", [33, 64])
def test_a_repacking_that_failed_halfway(out: int) -> None:
    module = stock(out, 96).eval()
    before = codec_for(module).read(module)
    with pytest.raises((AssertionError, RuntimeError)), torch.no_grad():
        module(torch.randn(1, 96))  # the platform's: out % 32 != 0, or rows that aren't whole blocks
    assert relative(codec_for(module).read(module), before) < 1e-6
    codec_for(module).protect_(module)
    x = torch.randn(1, 96)
    expected = x @ before.t() + module.bias
    torch.testing.assert_close(codec_for(module).forward(module, x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU or build doesn't repack (no AVX512_BF16)")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@torch.no_grad()
def test_codes_are_taken_by_a_repacked_weight(storage: torch.dtype, double_quant: bool) -> None:
    module: Any = stock(64, 128, compress_statistics=double_quant, quant_storage=storage).eval()
    codec = codec_for(module)
    module(torch.randn(1, 128))
    assert module.weight.quant_state.packing_format_for_cpu
    weight, quantized = codec.read(module), codec.quantized(module)
    assert quantized is not None
    assert quantized.double_quant is codec.quantizer(module).double_quant is False  # type: ignore[union-attr]
    assert torch.equal(quantized.dequantize(), weight)
    with pytest.warns(UserWarning, match="repacked this 4-bit weight for CPU inference"):
        codec.take_(module, quantized)
    assert torch.equal(codec.read(module), weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_codes_taken(module, 128)
