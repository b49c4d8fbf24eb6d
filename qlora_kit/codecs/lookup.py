"""A linear layer's function straight from its codec: for storage that has no kernel of its own, or a wrong one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .base import Codec


def lookup_linear(module: nn.Module, codec: Codec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """y = x W^T + b computed in ``dtype`` with W as ``codec`` reads it, in the dtype of ``x``.

    Gradients reach ``x`` and the bias; W is read again for them, so no dense W is kept in between.
    """
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    bias = None if bias is None else bias.to(dtype)
    return _LookupLinear.apply(x.to(dtype), bias, codec, module).to(x.dtype)


class _LookupLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, codec: Codec, module: nn.Module) -> Tensor:
        ctx.codec, ctx.module, ctx.dtype = codec, module, x.dtype
        with without_autocast(x.device):
            return F.linear(x, codec.read(module).to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.matmul(ctx.codec.read(ctx.module).to(grad.dtype)).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.dtype)
        return grad_x, grad_bias, None, None
