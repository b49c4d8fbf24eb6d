"""bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``. The only package that imports bitsandbytes.

- ``four_bit``: the codec of 4-bit linears
- ``int8``: the codec of int8 linears
- ``common``: the stock forward of both, with the bias left as it is
- ``kernel``: a 4-bit weight through bitsandbytes' own dequantization
- ``layout``: where a 4-bit weight's codes and scales are
- ``quant_state``: bitsandbytes' state of a 4-bit weight, filled with codes and scales that we chose
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor

from .four_bit import Codec4bit, linear_of_codes, quantize_linear
from .int8 import CodecInt8, linear_of_codes_int8, quantize_linear_int8
from .kernel import kernel_is_right

__all__ = [
    "Codec4bit",
    "CodecInt8",
    "empty_linear",
    "kernel_is_right",
    "linear_from_tensors",
    "linear_of_codes",
    "linear_of_codes_int8",
    "quantize_linear",
    "quantize_linear_int8",
]


def linear_from_tensors(
    tensors: Mapping[str, Tensor], in_features: int, out_features: int
) -> Linear4bit | Linear8bitLt | None:
    """The bias-free module whose state dict ``tensors`` is, or None if they are of neither type."""
    weight = tensors["weight"]
    if "SCB" in tensors:
        module = Linear8bitLt(in_features, out_features, bias=False, has_fp16_weights=False, device="meta")
        module.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, CB=weight, SCB=tensors["SCB"])
        return module
    statistics = {f"weight.{name.removeprefix('weight.')}": t for name, t in tensors.items() if name != "weight"}
    if not any("quant_state" in name for name in statistics):
        return None
    module4 = Linear4bit(in_features, out_features, bias=False, device="meta")
    module4.weight = Params4bit.from_prequantized(weight, statistics, device=weight.device, module=module4)
    return module4


def empty_linear(
    in_features: int,
    out_features: int,
    bias: bool,
    quant_type: str,
    *,
    double_quant: bool,
    threshold: float,
    dtype: torch.dtype,
) -> Linear4bit | Linear8bitLt:
    """A frozen module on the meta device, to be filled from a checkpoint; products in ``dtype``."""
    if quant_type == "int8":
        module: Linear4bit | Linear8bitLt = Linear8bitLt(
            in_features, out_features, bias, has_fp16_weights=False, threshold=threshold, device="meta"
        )
        module.weight.data = module.weight.data.to(torch.int8)
    else:
        module = Linear4bit(
            in_features,
            out_features,
            bias,
            dtype,
            compress_statistics=double_quant,
            quant_type=quant_type,
            device="meta",
        )
        module.weight.data = module.weight.data.to(torch.uint8)
    if module.bias is not None:
        module.bias.data = module.bias.data.to(dtype)
    return module.requires_grad_(False)
