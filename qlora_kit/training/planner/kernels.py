"""Kernels of a GPU that the meta device has no word for: what stands in for them, and what they hold inside.

On the meta device torch's attention is the plain one with its matrix of scores, and its grouped product knows bfloat16
alone. On a card they are fused kernels, and ``OnCard`` has the same calls take these, whose gradients torch knows the
shapes of. Cards before Ampere have no flash attention: there grouped heads without a mask do get the plain one, as
transformers hands them on.

What a kernel allocates for itself no mode can see, so ``hidden_bytes`` says it for the few where it counts.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class OnCard(TorchFunctionMode):
    """Tensors on the meta device are computed with as on a GPU.

    Args:
        flash: whether it has flash attention.
    """

    def __init__(self, flash: bool = True) -> None:
        super().__init__()
        self.flash = flash

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args and args[0].is_meta:
            return self._attention(*args, **kwargs)
        if func in _GROUPED and args[0].is_meta and (args[0].dtype != torch.bfloat16 or not self.flash):
            return self._product_by_groups(*args, **kwargs)
        return func(*args, **kwargs)

    def _product_by_groups(self, x: Tensor, weights: Tensor, offs: Tensor, **options: Any) -> Tensor:
        """Rows of ``x`` with the weight (in, out) of their group: as much as with one weight for all. On older cards
        transformers' own loop, which makes gradients of frozen weights too."""
        return x @ weights[0] if self.flash else torch.ops.transformers.grouped_mm_fallback(x, weights, offs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        scale, grouped = options.get("scale"), query.shape[-3] != key.shape[-3]
        half = query.dtype in (torch.float16, torch.bfloat16)
        if attn_mask is None and self.flash and half and query.shape[-1] <= 256:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if grouped or query.dim() != 4:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]


def _as_bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """What torch adds to the scores: a mask of yes and no becomes one of numbers, the same for all heads."""
    bias = torch.zeros_like(mask, dtype=query.dtype) if mask.dtype == torch.bool else mask
    return bias.expand(*query.shape[:-1], key.shape[-2])


# torch's function of that name hands on to one below it, unasked.
_GROUPED = {getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)} - {None}


def hidden_bytes(func: Any, args: Any) -> int:
    """Bytes that ``func`` holds on a GPU while it runs, beside what it returns."""
    found = _HIDDEN.get(getattr(getattr(func, "_schema", None), "name", ""))
    return 0 if found is None else found(*args)


def _dense_weight(x: Tensor, codes: Tensor, shape: Any, *others: Any) -> int:
    return prod(shape) * x.itemsize


def _products(x: Tensor, weight: Tensor, *others: Any) -> int:
    return prod(x.shape[:-1]) * weight.shape[0] * 4


def _sums_of_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> int:
    """Float32 sums of the queries' gradient, and keys' and values' for each head where heads share them."""
    shared = 2 * query.numel() * query.itemsize if query.shape[1] != key.shape[1] else 0
    return query.numel() * 4 + shared


_HIDDEN: dict[str, Callable[..., int]] = {
    "bitsandbytes::gemm_4bit": _dense_weight,
    "bitsandbytes::int8_scaled_mm": _products,
    "aten::_scaled_dot_product_flash_attention_backward": _sums_of_gradients,
}
