"""Linear layers that hold a rank's part in a storage that can't be a DTensor, few bits above all: they move activations
by themselves.

Such a module is an ordinary one of its type, with the sizes of the rank's part, so that its codec is the ordinary one
too. It carries its ``Sharding`` as the attribute ``sharding``, and two hooks around its forward do what torch's and
transformers' do around a DTensor's: take the input in the form that the plan says, and give the output in the form that
the next layer expects. A row's bias is the whole's, and is added once, after the sum.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...codecs.shards.tensors import is_dtensor
from ...errors import AdapterError
from .collectives import (
    copy_to_group,
    gather_for_parts,
    gather_from_group,
    reduce_from_group,
    reduce_to_pieces,
    split_to_group,
)
from .parts import dtensor_of, local
from .sharding import Sharding

_BIAS = "_bias_of_the_sum"


def moving_as_(module: Any, sharding: Sharding) -> Any:
    """Have ``module``, which holds this rank's part, take and give what ``sharding`` says.

    Raises:
        AdapterError: it isn't a linear layer.
    """
    linear: Any = module
    if not isinstance(module, nn.Linear):
        raise AdapterError(
            f"{type(module).__name__}: expected a linear layer to hold a shard in another storage, found one that "
            "isn't; leave it as it is, out of the targets of this start or merge"
        )
    if vars(module).get("sharding") is None:
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)
    linear.sharding = sharding
    return linear


def _enter(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    how: Sharding = module.sharding
    x = _taken(how, args[0])
    if how.kind == "column":
        x = gather_for_parts(x, how.sequence_dim, how.group) if how.takes == "sequence" else copy_to_group(x, how.group)
    elif how.takes == "whole":
        x = split_to_group(x, -1, how.group)
    if how.kind == "row" and module._parameters.get("bias") is not None:
        vars(module)[_BIAS] = module._parameters["bias"]
        module._parameters["bias"] = None
    return (x, *args[1:])


def _leave(module: Any, args: Any, y: Any) -> Any:
    how: Sharding = module.sharding
    bias = vars(module).pop(_BIAS, None)
    if bias is not None:
        module._parameters["bias"] = bias
    if not isinstance(y, Tensor):  # the forward raised
        return None
    if how.kind == "row":
        whole = how.gives == "whole"
        y = reduce_from_group(y, how.group) if whole else reduce_to_pieces(y, how.sequence_dim, how.group)
        y = y if bias is None else y + bias.to(y.dtype)
    elif how.gives != "features":
        y = gather_from_group(y, -1, how.group, how.shape[0])
        y = y if how.gives == "whole" else split_to_group(y, how.sequence_dim, how.group)
    if how.mesh is None or how.local_output:
        return y
    dims = {"whole": None, "features": y.dim() - 1, "sequence": how.sequence_dim}
    return dtensor_of(y, how.mesh, dims[how.gives], how.shape[0] if how.gives == "features" else None)


def _taken(how: Sharding, x: Tensor) -> Tensor:
    """``x`` as a plain tensor in the form that the layer takes."""
    if not is_dtensor(x):
        return x
    from torch.distributed.tensor import Replicate, Shard

    forms = {"whole": Replicate(), "features": Shard(x.dim() - 1), "sequence": Shard(how.sequence_dim)}
    return local(x.redistribute(placements=[forms[how.takes]]))  # type: ignore[attr-defined]
