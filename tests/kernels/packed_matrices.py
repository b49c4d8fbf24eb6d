"""Packed matrices of all kinds, and the float64 reference of their values."""

from __future__ import annotations

from typing import Any

import torch
from reference import quantization as ref
from torch import Tensor, nn

from qlora_kit.codecs.codebooks import STORED_TYPES
from qlora_kit.codecs.packed import PackedLinear, pack_linear, packed_matrix
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.kernels import PackedMatrix

TYPES = [name for name in STORED_TYPES if name != "int8"]
# Of every number of bits, with and without shifts, levels in order and not, by one code and by some.
FEW = ["signed2", "affine3", "fp4", "affine8", "trellis2", "trellis3", "trellis4"]
# (out, in, blocksize): whole blocks and groups in a row; blocks and bytes that straddle rows; one block; rows.
LAYOUTS = [(24, 128, 64), (33, 47, 32), (7, 5, 64), (1, 5, None), (9, 33, None), (16, 64, 4096)]
# A product's largest error, relative to the sum of the magnitudes of its terms: rounding the terms, and the result.
ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def make(out: int, fan_in: int, blocksize: int | None, quant_type: str, double_quant: bool = True) -> PackedLinear:
    linear = nn.Linear(fan_in, out)
    quantized = quantize_matrix(linear.weight.detach(), quant_type, blocksize, double_quant=double_quant)
    return pack_linear(linear, quantized)


def matrix_and_values(*args: Any) -> tuple[PackedMatrix, Tensor]:
    """Of ``make``'s arguments; the values are float64 (out, in), of rotated types those of the rotated weight."""
    module = make(*args)
    return packed_matrix(module), torch.from_numpy(ref.read_packed(module, stored_basis=True))


def product_error(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The largest error of x W^T + b, with float64 W, relative to the magnitudes of its terms."""
    x, bias = x.double().cpu(), None if bias is None else bias.double().cpu()
    exact, magnitude = x @ weight.T, x.abs() @ weight.abs().T
    if bias is not None:
        exact, magnitude = exact + bias, magnitude + bias.abs()
    return ((found.double().cpu() - exact).abs() / magnitude.clamp(min=1e-30)).max().item() if found.numel() else 0.0
