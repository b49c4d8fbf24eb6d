"""Linear layers of every storage with adapters, in training: what the fused form stands on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted_layers import adapt
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers.pytorch_utils import Conv1D

from qlora_kit import AdapterLayer
from qlora_kit.codecs.packed import pack_linear
from qlora_kit.codecs.quantized import quantize_matrix


def packed(dtype: torch.dtype = torch.float32, quant_type: str = "signed2", **options: Any) -> nn.Module:
    linear = nn.Linear(64, 24).to(dtype)
    return pack_linear(linear, quantize_matrix(linear.weight.detach().float(), quant_type, 64, **options))


BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "dense": lambda dtype: nn.Linear(64, 24).to(dtype),
    "conv1d": lambda dtype: Conv1D(24, 64).to(dtype),
    "4-bit": lambda dtype: Linear4bit(64, 24, quant_type="nf4", compute_dtype=dtype).to("cpu"),
    "8-bit": lambda dtype: Linear8bitLt(64, 24, has_fp16_weights=False).to(dtype).to("cpu"),
    "packed": packed,
    "rotated": lambda dtype: packed(dtype, "trellis2"),
}
casts = pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")


def fused_layer(base: nn.Module, adapters: int = 1, **config: Any) -> AdapterLayer:
    lora, layer = adapt(base, adapters, fan_in_fan_out=isinstance(base, Conv1D), **config)
    lora.train()
    return layer
