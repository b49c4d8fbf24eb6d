"""The dtype to multiply in on a device: the tensors' own, unless the device only emulates it.

CPUs without bfloat16 or float16 instructions take ten to a hundred times as long for a product in these as in float32,
which holds every value of both. There it is computed in float32 and rounded once.
"""

from __future__ import annotations

import torch

# Asked once, here: a compiler can't trace the question, but reads the answer.
_NATIVE = {
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


def product_dtype(device_type: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or float32 where devices of this type are slow at it."""
    return torch.float32 if device_type == "cpu" and not _NATIVE.get(dtype, True) else dtype
