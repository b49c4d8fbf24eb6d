"""Base modules of every codec, made on the CPU so that they hold the same codes wherever they go."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit.codecs.packed import pack_linear
from qlora_kit.codecs.quantized import quantize_matrix

Make = Callable[[torch.dtype], nn.Module]


def seeded(kind: Callable[..., nn.Module], *sizes: Any, **settings: Any) -> Any:
    torch.manual_seed(7)
    return kind(*sizes, **settings)


def four_bit(out: int = 48, fan_in: int = 64, **settings: Any) -> Make:
    def make(dtype: torch.dtype) -> nn.Module:
        from qlora_kit.codecs.bnb import quantize_linear

        linear = seeded(nn.Linear, fan_in, out).to(dtype)
        return quantize_linear(linear, linear.weight.detach().float(), **settings)

    return make


def int8(dtype: torch.dtype) -> nn.Module:
    from qlora_kit.codecs.bnb import quantize_linear_int8

    linear = seeded(nn.Linear, 64, 48).to(dtype)
    return quantize_linear_int8(linear, linear.weight.detach().float())


def packed(quant_type: str, blocksize: int | None = 64, **settings: Any) -> Make:
    def make(dtype: torch.dtype) -> nn.Module:
        linear = seeded(nn.Linear, 64, 48).to(dtype)
        return pack_linear(linear, quantize_matrix(linear.weight.detach().float(), quant_type, blocksize, **settings))

    return make


#: Linear maps. 96 isn't a multiple of the blocksize, 37 no multiple of 8.
LINEARS: dict[str, Make] = {
    "dense": lambda dtype: seeded(nn.Linear, 64, 48).to(dtype),
    "dense, odd": lambda dtype: seeded(nn.Linear, 33, 21).to(dtype),
    "Conv1D": lambda dtype: seeded(Conv1D, 48, 64).to(dtype),
    "nf4": four_bit(),
    "fp4": four_bit(quant_type="fp4"),
    "nf4, double": four_bit(double_quant=True),
    "nf4, odd": four_bit(37, 96),
    "signed2": packed("signed2"),
    "signed2, double": packed("signed2", double_quant=True),
    "lloyd3": packed("lloyd3"),
    "affine3, double": packed("affine3", double_quant=True),
    "packed nf4, rows": packed("nf4", None),
    "uniform8": packed("uniform8"),
}
STORED_BY_BITSANDBYTES = [kind for kind in LINEARS if kind.startswith(("nf4", "fp4"))]


def is_transposed(module: nn.Module) -> bool:
    return isinstance(module, Conv1D)
