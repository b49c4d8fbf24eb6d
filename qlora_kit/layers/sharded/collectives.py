"""What the ranks of a group tell each other, as functions with gradients.

A tensor is *whole* where every rank holds the same and each rank's gradient of it is all of it; *partial* where the
ranks hold terms of one sum, or where a whole tensor's gradients are such terms; *cut* where each rank holds a piece.
Each function turns one of these into another, and its gradient turns back:

    copy_to_group          whole -> used by each for its own part    the gradients, terms of a sum, are summed
    reduce_from_group      terms -> whole                            each term's gradient is the sum's
    gather_from_group      cut -> whole                              each takes its piece of the gradient
    split_to_group         whole -> cut                              gradients of pieces are gathered
    gather_for_parts       cut -> used by each for its own part      gradients are summed, and each takes its piece
    reduce_to_pieces       terms -> cut                              gradients of pieces are gathered

They come in pairs that are each other's gradients (``f`` and ``g`` of Shoeybi et al. 2019, arXiv 1909.08053, and the
sequence-parallel pair of Korthikanti et al. 2022, arXiv 2205.05198), so they can be differentiated any number of
times. Pieces are those of ``torch.chunk``: equal, but for the last ones where the size isn't divisible. A group of one
process is told nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# What torch calls them since 2.13, and before.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def pieces_of(size: int, count: int) -> list[int]:
    """How ``size`` is cut into ``count`` pieces, as ``torch.chunk`` and DTensor do: the last may be short or empty."""
    full = -(-size // count)
    return [max(0, min(full, size - full * n)) for n in range(count)]


def piece_of(x: Tensor, dim: int, group: Any) -> Tensor:
    """This rank's piece of ``x``, a view."""
    pieces = pieces_of(x.shape[dim], dist.get_world_size(group))
    rank = dist.get_rank(group)
    return x.narrow(dim, sum(pieces[:rank]), pieces[rank])


def sum_over(x: Tensor, group: Any) -> Tensor:
    """The sum of every rank's ``x``, new."""
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def joined(x: Tensor, dim: int, group: Any, size: int | None = None) -> Tensor:
    """Every rank's piece ``x`` along ``dim``, in the ranks' order; ``size`` is that of all of them (equal pieces by
    default)."""
    count, dim = dist.get_world_size(group), dim % x.dim()
    pieces = [x.shape[dim]] * count if size is None else pieces_of(size, count)
    own = x.transpose(0, dim)
    if (short := pieces[0] - own.shape[0]) > 0:  # all ranks have to send as much
        own = torch.cat([own, own.new_zeros(short, *own.shape[1:])])
    own = own.contiguous()
    found = own.new_empty(count * pieces[0], *own.shape[1:])
    _all_gather(found, own, group=group)
    if sum(pieces) != len(found):
        found = torch.cat([part[:wanted] for part, wanted in zip(found.chunk(count), pieces, strict=True)])
    return found.transpose(0, dim).contiguous()


def summed_piece(x: Tensor, dim: int, group: Any) -> Tensor:
    """This rank's piece of the sum of every rank's ``x``."""
    count, dim = dist.get_world_size(group), dim % x.dim()
    if x.shape[dim] % count or x.device.type == "cpu":  # where gloo sums whole tensors only
        return piece_of(sum_over(x, group), dim, group).contiguous()
    own = x.transpose(0, dim).contiguous()
    found = own.new_empty(len(own) // count, *own.shape[1:])
    _reduce_scatter(found, own, group=group)
    return found.transpose(0, dim).contiguous()


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Reduce.apply(grads[0], ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Copy.apply(grads[0], ctx.group), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any, size: int | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return joined(x, dim, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Split.apply(grads[0], ctx.dim, ctx.group), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group, ctx.size = dim, group, x.shape[dim]
        return piece_of(x, dim, group).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Gather.apply(grads[0], ctx.dim, ctx.group, ctx.size), None, None


class _GatherForParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any, size: int | None) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return joined(x, dim, group, size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _ReduceToPieces.apply(grads[0], ctx.dim, ctx.group), None, None, None


class _ReduceToPieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group, ctx.size = dim, group, x.shape[dim]
        return summed_piece(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _GatherForParts.apply(grads[0], ctx.dim, ctx.group, ctx.size), None, None


#: The group of this process and nobody else, which libraries that know of one make no group for.
ALONE: Any = "alone"


def alone(group: Any) -> bool:
    """Whether there is nobody to tell."""
    return group is ALONE or not dist.is_initialized() or dist.get_world_size(group) == 1


def copy_to_group(x: Tensor, group: Any = None) -> Tensor:
    """``x``, which every rank has, for each to compute its own part with; gradients are summed over the group."""
    return x if alone(group) else _Copy.apply(x, group)


def reduce_from_group(x: Tensor, group: Any = None) -> Tensor:
    """The sum of every rank's ``x``; its gradient, which every rank has, is each term's."""
    return x if alone(group) else _Reduce.apply(x, group)


def gather_from_group(x: Tensor, dim: int, group: Any = None, size: int | None = None) -> Tensor:
    """Every rank's piece ``x`` along ``dim``, ``size`` in all, for computing the same on all ranks."""
    return x if alone(group) else _Gather.apply(x, dim, group, size)


def split_to_group(x: Tensor, dim: int, group: Any = None) -> Tensor:
    """This rank's piece along ``dim`` of ``x``, which every rank has; the gradients of all pieces are gathered."""
    return x if alone(group) else _Split.apply(x, dim, group)


def gather_for_parts(x: Tensor, dim: int, group: Any = None, size: int | None = None) -> Tensor:
    """As ``gather_from_group``, for each rank to compute its own part with: gradients are summed over the group."""
    return x if alone(group) else _GatherForParts.apply(x, dim, group, size)


def reduce_to_pieces(x: Tensor, dim: int, group: Any = None) -> Tensor:
    """This rank's piece along ``dim`` of the sum of every rank's ``x``; the gradients of all pieces are gathered."""
    return x if alone(group) else _ReduceToPieces.apply(x, dim, group)
