"""What the ranks do in the tests of the collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_kit.layers.sharded import collectives
from qlora_kit.layers.sharded.collectives import piece_of, pieces_of

Found = dict[str, list[tuple[Tensor, Tensor]]]


def of_every_size() -> dict[int, Found]:
    return {size: of_size(size) for size in (4, 5)}


def of_size(size: int) -> Found:
    """Each function, used twice in a loss: that, its gradient and the gradient of the gradient's square, each with what
    one process computes from the tensors of all ranks."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    draw = [torch.randn(size, 3, dtype=torch.float64) for _ in range(1 + 2 * world)]
    full, terms, weights = draw[0], draw[1 : 1 + world], draw[1 + world :]
    cut = list(full.split([piece for piece in pieces_of(size, world)]))
    own = piece_of(weights[0], 0, None)

    def of_whole(y: Tensor) -> Tensor:  # the same on every rank
        return (y.sin() * weights[0]).sum() + y.pow(3).sum()

    def of_parts(y: Tensor) -> Tensor:  # each rank has a term of the loss
        return collectives.reduce_from_group((y * weights[rank]).sin().sum() + (y * weights[rank]).pow(3).sum())

    def of_pieces(y: Tensor) -> Tensor:  # each rank has some elements
        return collectives.reduce_from_group((y.sin() * own).sum() + y.pow(3).sum())

    def all_parts(y: Tensor) -> Tensor:
        return torch.stack([(y * w).sin().sum() + (y * w).pow(3).sum() for w in weights]).sum()

    reduce, gather = collectives.reduce_from_group, collectives.gather_from_group
    copy, split = collectives.copy_to_group, collectives.split_to_group
    to_parts, to_pieces = collectives.gather_for_parts, collectives.reduce_to_pieces
    return {
        "reduce_from_group": _both(
            terms, rank, lambda x: of_whole(reduce(x)) + of_whole(2 * reduce(x)), lambda xs: _twice(of_whole, sum(xs))
        ),
        "gather_from_group": _both(
            cut,
            rank,
            lambda x: of_whole(gather(x, 0, None, size)) + of_whole(2 * gather(x, 0, None, size)),
            lambda xs: _twice(of_whole, torch.cat(xs)),
        ),
        "copy_to_group": _both(
            [full], 0, lambda x: of_parts(copy(x)) + of_parts(2 * copy(x)), lambda xs: _twice(all_parts, xs[0])
        ),
        "gather_for_parts": _both(
            cut,
            rank,
            lambda x: of_parts(to_parts(x, 0, None, size)) + of_parts(2 * to_parts(x, 0, None, size)),
            lambda xs: _twice(all_parts, torch.cat(xs)),
        ),
        "split_to_group": _both(
            [full], 0, lambda x: of_pieces(split(x, 0)) + of_pieces(2 * split(x, 0)), lambda xs: _twice(of_whole, xs[0])
        ),
        "reduce_to_pieces": _both(
            terms,
            rank,
            lambda x: of_pieces(to_pieces(x, 0)) + of_pieces(2 * to_pieces(x, 0)),
            lambda xs: _twice(of_whole, sum(xs)),
        ),
    }


def _twice(loss: Any, y: Any) -> Tensor:
    found: Tensor = loss(y) + loss(2 * y)
    return found


def _both(values: list[Tensor], mine: int, found: Any, expected: Any) -> list[tuple[Tensor, Tensor]]:
    own, leaves = values[mine].clone().requires_grad_(), [value.clone().requires_grad_() for value in values]
    value, total = found(own), expected(leaves)
    (first,) = torch.autograd.grad(value, own, create_graph=True)
    firsts = torch.autograd.grad(total, leaves, create_graph=True)
    penalty = first.square().sum()
    if len(values) > 1:  # each rank has a gradient of its own
        penalty = collectives.reduce_from_group(penalty)
    (second,) = torch.autograd.grad(penalty, own)
    (wanted,) = torch.autograd.grad(sum(f.square().sum() for f in firsts), leaves[mine])
    return [(value.detach(), total.detach()), (first.detach(), firsts[mine].detach()), (second, wanted)]
