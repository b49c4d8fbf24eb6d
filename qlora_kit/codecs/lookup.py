"""A linear layer's function straight from its codec: for storage that has no kernel of its own, or a wrong one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .autocast import without_autocast
from .base import Codec


class Products(Protocol):
    """The two products with a frozen weight W (out, in), each in its input's dtype; autocast is off, and autograd."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + b: (..., in) to (..., out)."""
        ...

    def gradient(self, grad: Tensor) -> Tensor:
        """grad W: (..., out) to (..., in)."""
        ...


@dataclass(frozen=True)
class _WholeWeight:
    """Products with the weight as a codec gives it, asked for each time."""

    codec: Codec
    module: nn.Module

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        weight = self.codec.multiplier(self.module, x.dtype)
        return F.linear(self.codec.to_basis(self.module, x), weight, bias)

    def gradient(self, grad: Tensor) -> Tensor:
        grad_x = grad.matmul(self.codec.multiplier(self.module, grad.dtype))
        return self.codec.from_basis(self.module, grad_x)


def lookup_linear(module: nn.Module, codec: Codec, x: Tensor, dtype: torch.dtype) -> Tensor:
    """y = x W^T + b computed in ``dtype`` with W as ``codec`` reads it, in the dtype of ``x``.

    Gradients reach ``x`` and the bias; W is read again for them, so no dense W is kept in between.
    """
    return frozen_linear(_WholeWeight(codec, module), x, module.bias, dtype)  # type: ignore[arg-type]


def frozen_linear(products: Products, x: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y = x W^T + b computed in ``dtype`` by ``products``, in the dtype of ``x``, differentiable in ``x``, ``bias``."""
    bias = None if bias is None else bias.to(dtype)
    return _FrozenLinear.apply(x.to(dtype), bias, products).to(x.dtype)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, products: Products) -> Tensor:
        ctx.products, ctx.dtype = products, x.dtype
        with without_autocast(x.device):
            return products.linear(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = ctx.products.gradient(grad).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.dtype)
        return grad_x, grad_bias, None
