"""What the ranks do in the tests of the collectives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qlora_kit.layers.sharded import collectives
from qlora_kit.layers.sharded.collectives import piece_of


def pairs(length: int) -> dict[str, Any]:
    """Every function on this rank's tensor, used twice; its value, its gradient, and the gradient of a penalty on that,
    each beside what one process computes from the tensors of all ranks."""
    rank, world, size = dist.get_rank(), dist.get_world_size(), length
    torch.manual_seed(7)
    full = torch.randn(size, 3, dtype=torch.float64)
    terms = [torch.randn(size, 3, dtype=torch.float64) for _ in range(world)]
    by_rank = [torch.randn(size, 3, dtype=torch.float64) for _ in range(world)]  # what each multiplies with
    found: dict[str, Any] = {}

    def whole_loss(y: Tensor) -> Tensor:
        return (y.sin() * by_rank[0]).sum()

    # One loss on every rank, of a whole tensor.
    ways = {
        "reduce": (terms[rank], lambda x: collectives.reduce_from_group(x), lambda all_x: sum(all_x)),
        "gather": (
            piece_of(full, 0, None),
            lambda x: collectives.gather_from_group(x, 0, None, size),
            lambda all_x: torch.cat(all_x),
        ),
    }
    for name, (own, function, together) in ways.items():
        leaves = [t.clone().requires_grad_() for t in (terms if name == "reduce" else full.split(_pieces(size, world)))]
        expected = whole_loss(together(leaves)) + whole_loss(2 * together(leaves))
        found[name] = _compare(own, lambda x, f=function: whole_loss(f(x)) + whole_loss(2 * f(x)), expected, leaves, rank)

    # Each rank adds its own term to the loss; gradients of what was whole are sums.
    leaf = full.clone().requires_grad_()
    expected = sum(((leaf * w).sin().sum() + (leaf * w).square().sum() for w in by_rank), torch.zeros(()))
    x = full.clone().requires_grad_()
    y = collectives.copy_to_group(x) * by_rank[rank]
    z = collectives.copy_to_group(x) * by_rank[rank]
    found["copy"] = _gradients(collectives.reduce_from_group(y.sin().sum() + z.square().sum()), x, expected, leaf)

    leaves = [t.clone().requires_grad_() for t in full.split(_pieces(size, world))]
    expected = sum(((torch.cat(leaves) * w).sin().sum() for w in by_rank), torch.zeros(()))
    x = piece_of(full, 0, None).clone().requires_grad_()
    y = collectives.gather_for_parts(x, 0, None, size) * by_rank[rank]
    found["gather for parts"] = _gradients(collectives.reduce_from_group(y.sin().sum()), x, expected, leaves[rank])

    # What is cut: each rank has its part of the loss.
    leaf = full.clone().requires_grad_()
    expected = (leaf.sin() * by_rank[0]).sum()
    x = full.clone().requires_grad_()
    y = collectives.split_to_group(x, 0).sin() * piece_of(by_rank[0], 0, None)
    found["split"] = _gradients(collectives.reduce_from_group(y.sum()), x, expected, leaf)

    leaves = [t.clone().requires_grad_() for t in terms]
    expected = (sum(leaves).sin() * by_rank[0]).sum()  # type: ignore[union-attr]
    x = terms[rank].clone().requires_grad_()
    y = collectives.reduce_to_pieces(x, 0).sin() * piece_of(by_rank[0], 0, None)
    found["reduce to pieces"] = _gradients(collectives.reduce_from_group(y.sum()), x, expected, leaves[rank])
    return found


def _pieces(size: int, world: int) -> list[int]:
    return collectives.pieces_of(size, world)


def _compare(own: Tensor, loss: Any, expected: Tensor, leaves: Any, rank: int) -> list[tuple[Tensor, Tensor]]:
    x = own.clone().requires_grad_()
    return _gradients(loss(x), x, expected, leaves[rank])


def _gradients(loss: Tensor, x: Tensor, expected: Tensor, leaf: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pairs of found and expected: the loss and the first gradient."""
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (wanted,) = torch.autograd.grad(expected, leaf, create_graph=True)
    return [(loss.detach(), expected.detach()), (first.detach(), wanted.detach())]
