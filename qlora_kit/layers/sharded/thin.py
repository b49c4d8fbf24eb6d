"""A branch s B (A x) beside a sharded layer: from what the base is given to what it gives, with thin traffic.

The input x and the output have as many columns as the model is wide; between them stands z = A x of r columns. All that
ranks tell each other here is z, or a factor, never x or the output:

- *column*, whole -> features: z is the same on every rank, and each multiplies it by its rows of B. Gradients of z are
  terms of a sum.
- *row*, features -> whole: what each rank's part of x gives are terms of z, which are summed; then B, the same
  everywhere.
- Tokens that are cut (sequence parallelism) stay so until z: that is gathered, or summed into pieces. The factor that
  every rank has then sees some of the tokens only, so its gradients are summed.
- Where a base gathers its output, or is given inputs that it cuts itself, the branch gathers the cut factor instead,
  (out + in) r numbers for all tokens, and computes the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .collectives import (
    copy_to_group,
    gather_for_parts,
    gather_from_group,
    reduce_from_group,
    reduce_to_pieces,
    split_to_group,
)
from .sharding import Form, Sharding

#: (x, A) -> z: how inputs meet A (r, in), the rank's part of both where they are cut.
Narrow = Callable[[Tensor, Tensor], Tensor]


def thin_branch(
    sharding: Sharding,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    scale: float,
    narrow: Narrow = F.linear,
    takes: Form | None = None,
) -> Tensor:
    """scale * B (A x), in the form that the base gives its output in.

    Args:
        x: (..., in), or what ``narrow`` takes, in the form ``takes``, by default the one that ``sharding`` says.
        A, B: (r, in) and (out, r): this rank's part of the one that is cut.
    """
    product = _column if sharding.kind == "column" else _row
    return product(sharding, x, A, B, scale, narrow, takes or sharding.takes)


def _column(how: Sharding, x: Tensor, A: Tensor, B: Tensor, scale: float, narrow: Narrow, takes: Form) -> Tensor:
    group, tokens = how.group, how.sequence_dim
    cut = takes == "sequence"
    z = narrow(x, copy_to_group(A, group) if cut else A) * scale
    if how.gives == "features":
        return F.linear(gather_for_parts(z, tokens, group) if cut else copy_to_group(z, group), B)
    if how.gives == "sequence":
        z = z if cut else split_to_group(z, tokens, group)
        return F.linear(z, gather_for_parts(B, 0, group, how.shape[0]))
    return F.linear(gather_from_group(z, tokens, group) if cut else z, gather_from_group(B, 0, group, how.shape[0]))


def _row(how: Sharding, x: Tensor, A: Tensor, B: Tensor, scale: float, narrow: Narrow, takes: Form) -> Tensor:
    group, tokens = how.group, how.sequence_dim
    if takes == "features":
        z = narrow(x, A) * scale
        if how.gives == "whole":
            return F.linear(reduce_from_group(z, group), B)
        return F.linear(reduce_to_pieces(z, tokens, group), copy_to_group(B, group))
    z = narrow(x, gather_from_group(A, 1, group, how.shape[1])) * scale
    if how.gives == "whole":
        return F.linear(z, B)
    return F.linear(split_to_group(z, tokens, group), copy_to_group(B, group))
