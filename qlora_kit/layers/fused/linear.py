"""A linear layer and its branches as one function: y = x W^T + b + sum of s (M . x) A^T B^T, M a dropout mask.

Written as a sum of modules, a branch keeps a float32 copy of the layer's input, another of what dropout left of it and
the product of rank r, reads the input once more and the output twice. Here

- what is kept is x itself, the tensor that the layer was given. Layers that read the same one (q, k, v; gate, up) keep
  it together. With A frozen x isn't kept at all, but the product of rank r;
- masks are drawn again from their seeds, and the product of rank r is computed again;
- branches are added in the memory of the layer's output, and of its input's gradient, scaled where they have r columns;
- the base weight is dequantized once forward, and once backward if the input wants a gradient, on CPUs into memory
  that is reused;
- where a float32 product has more tokens than the weight has worth of rows, s B A is added to the weight instead,
  which is cheaper than two passes over the tokens (RunLoRA, arXiv 2312.03415, picks orders by shape likewise).

Precision. Products that a device has no instructions for are computed in float32 (``kernels.native``). Factors keep
their digits (``thin``), and a sum is rounded to the activations' dtype once. With u = 2^-9 (bfloat16) or 2^-12
(float16): y is within 2 u (|y| + |y0|) of its value in float32, y0 the base's output, and gradients within 8 u of the
largest element of theirs; in float32 both differ by the order of sums only. The tests hold these.

The readable form is ``AdapterLayer.forward``; both are tested on the same cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...codecs import Codec
from ...codecs.autocast import without_autocast
from ...codecs.base import autocasts
from ...errors import AdapterError
from ...kernels.native import product_dtype
from ...kernels.scratch import is_scratch, scratch
from . import thin
from .branch import Branch


@dataclass(frozen=True)
class Base:
    """A base module, how it keeps its weight, and the dtype that it computes in: its own, autocast's or its input's.

    Attributes:
        merged: whether that weight has the branches in it (``layers.as_merged``); these are then wanted for the
            gradients of their factors alone.
    """

    module: nn.Module
    codec: Codec
    dtype: torch.dtype
    merged: bool = False

    def own_dtypes(self, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        """The dtypes of the product and of the output, where it is multiplied here; None where the module's forward is
        called, whose kernels are the best there are."""
        dtypes = self.codec.linear_dtypes(self.module, x) if x.device.type == "cpu" else None
        return dtypes and (product_dtype("cpu", dtypes[0]), dtypes[1])

    def weight(self, dtype: torch.dtype, branches: Sequence[Branch] = ()) -> Tensor:
        """W plus the deltas of ``branches``, (out, in), in the codec's basis, to be used before the next call."""
        weight = self.codec.multiplier(self.module, dtype)
        for branch in branches:
            memory = weight if is_scratch(weight) else scratch(tuple(weight.shape), dtype, weight.device)
            B, A = branch.B.to(dtype), self.to_basis(branch.A.to(dtype))
            weight = torch.addmm(weight, B, A, alpha=branch.scale, out=memory)
        return weight

    def to_basis(self, x: Tensor) -> Tensor:
        """Inputs (..., in) as ``weight`` is multiplied with."""
        return self.codec.to_basis(self.module, x)

    def version(self) -> tuple[Any, int]:
        """The weight as a parameter, and how often it has been written to."""
        weight = self.module._parameters.get("weight")
        return weight, 0 if weight is None or weight.is_inference() else weight._version

    def check_unwritten(self, version: tuple[Any, int]) -> None:
        """Raise an AdapterError if the weight has been written to since ``version``, as autograd does for what it
        keeps; the weight isn't kept, but read again."""
        now = self.version()
        if now[0] is version[0] and now[1] != version[1]:
            raise AdapterError(
                f"{type(self.module).__name__}.weight: expected the weight of the forward pass in the backward pass, "
                f"found one that was written to in between (version {now[1]}, not {version[1]}); call backward() first"
            )


@dataclass(frozen=True)
class Made:
    """How a layer's input is made of what is kept in its place, elementwise and without parameters of its own."""

    make: Callable[..., Tensor]
    count: int

    def again(self, kept: Sequence[Tensor], autocast: torch.dtype | None) -> tuple[list[Tensor], Tensor]:
        """What was kept, as leaves, and the input made of them anew, with its graph, under the forward's autocast."""
        device = kept[0].device
        casts = torch.autocast(device.type, autocast, cache_enabled=False) if autocast else without_autocast(device)
        with torch.enable_grad(), casts:
            leaves = [tensor.detach().requires_grad_() for tensor in kept]
            return leaves, self.make(*leaves)


def fused_linear(
    base: Base, x: Tensor | Sequence[Tensor], bias: Tensor | None, branches: Sequence[Branch], made: Made | None = None
) -> Tensor:
    """The layer's output for ``x`` (..., in), in the dtype that the base gives it in, ``bias`` (out,) included.

    Args:
        made: the input is ``made.make`` of the tensors ``x``, which are kept in its place.
    """
    factors = (factor for branch in branches for factor in (branch.A, branch.B))
    kept = (x,) if made is None else x
    y: Tensor = _FusedLinear.apply(base, [(b.s, b.mask) for b in branches], made, bias, *kept, *factors)
    return y


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: Base, settings: Sequence[Any], made: Made | None, bias: Tensor | None, *tensors: Tensor
    ) -> Any:
        count = 1 if made is None else made.count
        given, factors = tensors[:count], tensors[count:]
        x = given[0] if made is None else made.make(*given)
        branches = _branches(factors, settings)
        needs = ctx.needs_input_grad[4 + count :]
        keeps_x = made is not None or any(needs if base.merged else needs[::2])  # of some A
        own = base.own_dtypes(x)
        ctx.base, ctx.settings, ctx.product = base, settings, own[0] if own else base.dtype
        y = None if own else base.codec.forward(base.module, x)
        with without_autocast(x.device):
            rows = _rows(x, base.dtype)
            beside = [] if base.merged else branches
            folded = [b for b in beside if own and keeps_x and b.cheaper_in_the_weight(len(rows), ctx.product)]
            if y is None:
                weight = base.weight(ctx.product, folded)
                inputs = base.to_basis(_cast(x, rows, ctx.product))
                y = F.linear(inputs, weight, None if bias is None else bias.to(ctx.product))
            flat, narrowed = _flat(y), []
            for branch in beside:
                if branch not in folded:
                    narrowed.append(branch.narrowed(rows))
                    branch.add_(flat, narrowed[-1])
        ctx.shape, ctx.dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        ctx.made, ctx.version, ctx.keeps_x = made, base.version(), keeps_x
        ctx.autocast = torch.get_autocast_dtype(x.device.type) if autocasts(x) else None
        ctx.save_for_backward(*factors, *(given if keeps_x else narrowed))
        # No view: autograd forbids to write into what a function returns a view of.
        y = torch.ops.aten._unsafe_view(flat, (*x.shape[:-1], flat.shape[-1]))
        return y.to(own[1]) if own else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise AdapterError(
                "expected gradients of first order, found create_graph=True, which the fused branch doesn't compute; "
                "call qlora_kit.set_branch('plain') before the forward pass"
            )
        (grad,), base, made, count = grads, ctx.base, ctx.made, 2 * len(ctx.settings)
        base.check_unwritten(ctx.version)
        saved = ctx.saved_tensors  # once: checkpointing computes them at the first access
        branches, kept = _branches(saved[:count], ctx.settings), saved[count:]
        needs_bias, needs_x, needs = ctx.needs_input_grad[3], *_needs(ctx.needs_input_grad[4:], count)
        with without_autocast(grad.device):
            leaves, x = (None, kept[0] if kept else None) if made is None else made.again(kept, ctx.autocast)
            rows, grad_x = _rows(grad, base.dtype), None
            beside = [] if base.merged else branches
            folded = [b for b in beside if needs_x and b.cheaper_in_the_weight(len(rows), ctx.product)]
            if needs_x:
                grad_x = _cast(grad, rows, ctx.product) @ base.weight(ctx.product, folded)
                grad_x = base.codec.from_basis(base.module, grad_x)
            inputs = _rows(x.detach(), base.dtype) if ctx.keeps_x and x is not None else None
            found: list[Tensor | None] = []
            for i, branch in enumerate(branches):
                found += branch.backward(
                    rows,
                    x=inputs,
                    narrowed=kept[i] if inputs is None and beside else None,
                    grad_x=None if branch in folded or base.merged else grad_x,
                    needs=(needs[2 * i], needs[2 * i + 1]),
                )
            if grad_x is not None:
                grad_x = grad_x.to(ctx.dtype).view(ctx.shape)
            grad_bias = rows.sum(0).to(ctx.bias_dtype) if needs_bias else None
        grads_given = [grad_x] if made is None else _through(leaves, x, grad_x)
        return None, None, None, grad_bias, *grads_given, *found


def _needs(needs: Sequence[bool], factors: int) -> tuple[bool, Sequence[bool]]:
    """Whether some input wants a gradient, and which of the factors, which come last."""
    return any(needs[:-factors]), needs[-factors:]


def _through(leaves: Sequence[Tensor] | None, x: Tensor | None, grad_x: Tensor | None) -> Sequence[Tensor | None]:
    """The gradients of ``leaves``, which ``x`` was made of."""
    assert leaves is not None
    assert x is not None
    if grad_x is None:
        return [None] * len(leaves)
    return torch.autograd.grad(x, leaves, grad_x.to(x.dtype))  # autocast may have made another of it


def _branches(factors: Sequence[Tensor], settings: Sequence[Any]) -> list[Branch]:
    return [Branch(A, B, s, mask) for A, B, (s, mask) in zip(factors[::2], factors[1::2], settings, strict=True)]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -2) if x.ndim > 1 else x[None]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as (tokens, features) in what thin products take."""
    rows = _flat(x)
    return rows.to(torch.promote_types(dtype, torch.float32) if thin.casts_up(x.device) else dtype)


def _cast(x: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as (tokens, features) in ``dtype``: ``rows``, which are made from it, where they are."""
    return rows if rows.dtype == dtype else _flat(x).to(dtype)
