"""What the 4-bit and int8 linears share: the bias, the dense stand-in, and the stock forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def take_bias_(module: nn.Linear, source: nn.Linear) -> None:
    if source.bias is not None:
        module.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=source.bias.requires_grad)
    module.train(source.training)


def dense_linear(module: nn.Linear, weight: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A frozen ``nn.Linear`` of ``weight``, with ``module``'s bias copied."""
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    take_bias_(dense, module)
    return dense.to(dtype)


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
