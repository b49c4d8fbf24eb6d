"""bitsandbytes' ``Linear4bit`` and ``Linear8bitLt``. The only package that imports bitsandbytes."""

from __future__ import annotations

from .four_bit import Codec4bit, kernel_is_right, quantize_linear
from .int8 import CodecInt8, quantize_linear_int8

__all__ = ["Codec4bit", "CodecInt8", "kernel_is_right", "quantize_linear", "quantize_linear_int8"]
