"""``quantized`` and ``take_``: the stored codes and scales as data read as the module does, and put back leave it as it
was, in every k-bit storage."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear8bitLt
from four_bit_linears import STORAGES, make, stock, storage_fits
from torch import nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.codebooks import SCHEMES
from qlora_kit.codecs.packed import pack_linear
from qlora_kit.codecs.quantized import quantize_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

PACKABLE = [name for name, kind in SCHEMES.items() if kind.bits in (2, 3, 4, 8)]


def stored_bits(module: Any) -> list[tuple[torch.dtype, bytes]]:
    found = [*codec_for(module).stored(module), *module.state_dict().values()]
    return [(part.dtype, part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for part in found]


@torch.no_grad()
def check(module: Any, width: int) -> None:
    codec, x = codec_for(module), torch.randn(3, width)
    before, parameter, weight, output = stored_bits(module), module.weight, codec.read(module), codec.forward(module, x)
    quantized = codec.quantized(module)
    quantizer = codec.quantizer(module)
    assert quantized is not None
    assert quantizer is not None
    assert (quantized.quant_type, quantized.double_quant) == (quantizer.quant_type, quantizer.double_quant)
    assert quantized.blocksize == quantizer.blocksize
    assert quantized.exact_scales is None
    # The same products in the same order, so the same bits.
    assert torch.equal(quantized.dequantize(), weight)
    codec.take_(module, quantized)
    assert stored_bits(module) == before, "nothing was to change"
    assert module.weight is parameter
    assert torch.equal(codec.forward(module, x), output)
    # And other codes are what is read then, whatever happens to the tensors that were given.
    others = replace(quantized, codes=quantized.codes.roll(1, 0).contiguous())
    expected = others.dequantize()
    codec.take_(module, others)
    others.codes.zero_()
    assert torch.equal(codec.read(module), expected)
    torch.testing.assert_close(
        codec.forward(module, x), x @ expected.T + module.bias, rtol=3e-2 if _int8(module) else 1e-4, atol=3e-2
    )


def _int8(module: Any) -> bool:
    return isinstance(module, Linear8bitLt)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), [(32, 64, 64), (37, 96, 64), (5, 7, 64), (8, 512, 4096)])
def test_four_bits(
    out: int, fan_in: int, blocksize: int, quant_type: str, double_quant: bool, storage: torch.dtype
) -> None:
    """5 x 7 is an odd number of codes: the last byte has one."""
    if not storage_fits(out, fan_in, storage):
        pytest.skip(f"{out}x{fan_in} nibbles aren't a whole number of {storage} values")
    settings: dict[str, Any] = {"quant_type": quant_type, "double_quant": double_quant, "quant_storage": storage}
    check(make(out, fan_in, blocksize, **settings).eval(), fan_in)


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU or build doesn't repack (no AVX512_BF16)")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("double_quant", [False, True])
@torch.no_grad()
def test_four_bits_that_an_evaluation_forward_has_repacked(storage: torch.dtype, double_quant: bool) -> None:
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
        check(module, 128)


@pytest.mark.parametrize("forwards", [0, 1])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("out", "fan_in"), [(32, 64), (37, 33)])
@torch.no_grad()
def test_int8(out: int, fan_in: int, train: bool, forwards: int) -> None:
    module = Linear8bitLt(fan_in, out, has_fp16_weights=False).to("cpu").train(train)
    for _ in range(forwards):  # the scales then lie elsewhere
        module(torch.randn(2, fan_in))
        assert module.weight.SCB is None
    codec = codec_for(module)
    weight, quantized = codec.read(module), codec.quantized(module)
    assert quantized is not None
    assert torch.equal(quantized.dequantize(), weight)
    check(module, fan_in)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", PACKABLE)
@pytest.mark.parametrize(("out", "fan_in", "blocksize"), [(37, 96, 64), (7, 5, 64), (9, 33, None)])
def test_packed(out: int, fan_in: int, blocksize: int | None, quant_type: str, double_quant: bool) -> None:
    linear = nn.Linear(fan_in, out)
    quantized = quantize_matrix(linear.weight.detach(), quant_type, blocksize, double_quant=double_quant)
    module = pack_linear(linear, quantized)
    check(module, fan_in)
    codec = codec_for(module)
    codec.take_(module, quantized)
    found = codec.quantized(module)
    assert found is not None
    assert torch.equal(found.codes, quantized.codes)
    assert all(torch.equal(*pair) for pair in zip(found.tensors(), quantized.tensors(), strict=True))


def test_storage_of_no_codes() -> None:
    linear = nn.Linear(4, 4)
    codec = codec_for(linear)
    assert codec.quantized(linear) is None
