"""4-bit linears, made by us and as the platform makes them, and their weights by the independent reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn

from qlora_kit.codecs.bnb import quantize_linear

STORAGES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32]
# (out, in, blocksize): out % 32 and in % blocksize zero and not, in % 16 zero and not, odd sizes, short tails.
SHAPES = [(32, 64, 64), (37, 96, 64), (64, 160, 64), (33, 31, 32), (5, 7, 64), (48, 16, 512), (8, 512, 4096)]
FAULTY = [(37, 96, 64), (64, 160, 64), (48, 16, 512)]


def make(out: int, fan_in: int, blocksize: int = 64, *, bias: bool = True, **kwargs: Any) -> Linear4bit:
    linear = nn.Linear(fan_in, out, bias=bias)
    return quantize_linear(linear, torch.randn(out, fan_in), blocksize=blocksize, **kwargs)


def stock(out: int, fan_in: int, **kwargs: Any) -> Linear4bit:
    """As bitsandbytes and transformers make one: unprotected."""
    return Linear4bit(fan_in, out, quant_type="nf4", **kwargs).to("cpu")


def relative(found: Tensor, expected: np.ndarray | Tensor) -> float:
    expected = torch.as_tensor(expected).double()
    return ((found.detach().double() - expected).norm() / expected.norm()).item()


def storage_fits(out: int, fan_in: int, storage: torch.dtype) -> bool:
    return math.ceil(out * fan_in / 2) % storage.itemsize == 0
