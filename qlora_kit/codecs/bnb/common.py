"""What the 4-bit and int8 linears share: the stock forward, with the bias left as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stock_forward(module: Any, x: Tensor, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Tensor:
    """bitsandbytes' forward, with a bias of another dtype set aside so that it can't cast the stored one."""
    bias: Tensor | None = module.bias
    if bias is None or bias.dtype == dtype:
        return module(x, *args, **kwargs)
    module._parameters["bias"] = None
    try:
        out: Tensor = module(x, *args, **kwargs)
    finally:
        module._parameters["bias"] = bias
    return out + bias.to(out.dtype)
