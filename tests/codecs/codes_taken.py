"""``quantized`` and ``take_``: the stored codes and scales as data read as the module does, and put back leave it as it
was, in every k-bit storage."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt

from qlora_kit.codecs import codec_for


def stored_bits(module: Any) -> list[tuple[torch.dtype, bytes]]:
    found = [*codec_for(module).stored(module), *module.state_dict().values()]
    return [(part.dtype, part.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()) for part in found]


@torch.no_grad()
def check_codes_taken(module: Any, width: int) -> None:
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
