"""Layers that torch's ``parallelize_module`` and transformers' ``tp_plan`` share out: how, as a ``Sharding``.

Both make a module's parameters DTensors and move activations around its forward: torch by hooks, transformers by a
function in the forward's place. Which forms inputs and outputs have is nowhere on the module but in these, bound as
arguments, so that is where it is looked for. Read there it is exact; guessed from shapes it would be wrong for
sequences of one token and for ranks without any. A module whose weight is a DTensor without either isn't tensor
parallel: FSDP gathers such weights before the forward, and they are none of this one's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from ...codecs.shards.view import is_tensor_parallel
from ...errors import AdapterError, UnsupportedModuleError
from .sharding import Form, Sharding, register_sharding


@register_sharding(nn.Linear, nn.Embedding)
def sharding_of_dtensor(module: Any) -> Sharding | None:
    """How ``module`` is sharded, None if it isn't by torch's or transformers' tensor parallelism.

    Raises:
        UnsupportedModuleError: by a plan that no branch can follow.
    """
    if not is_tensor_parallel(module):
        return None
    from torch.distributed.tensor import Shard

    weight = module._parameters["weight"]
    found = list(weight.placements)
    (cut,) = found if len(found) == 1 else (None,)
    if type(cut) is not Shard:
        raise _not_followed(module, f"a weight that is placed as {tuple(found)}")
    layouts = _layouts(module)
    if layouts is None:
        raise _not_followed(module, "hooks that say nothing of its inputs and outputs")
    takes, gives, local_output = layouts
    dim = cut.dim % 2
    out_in = tuple(weight.shape)
    if isinstance(module, nn.Embedding):
        dim, out_in = 1 - dim, (out_in[1], out_in[0])
        takes = (Shard(-1),) if dim == 1 else takes  # one-hot: each rank holds some of the words
    forms = [_form(module, layout) for layout in (takes, gives)]
    tokens = {token for _, token in forms if token is not None}
    if len(tokens) > 1:
        raise _not_followed(module, f"inputs and outputs cut along different dimensions {sorted(tokens)}")
    try:
        return Sharding(
            "column" if dim == 0 else "row",
            out_in,
            weight.device_mesh.get_group(),
            takes=forms[0][0],
            gives=forms[1][0],
            sequence_dim=tokens.pop() if tokens else 1,
            mesh=weight.device_mesh,
            local_output=local_output,
        )
    except AdapterError as error:
        raise UnsupportedModuleError(f"{type(module).__name__}({module.extra_repr()}): {error}") from error


def _layouts(module: nn.Module) -> tuple[Any, Any, bool] | None:
    """The placements of ``module``'s input and output, and whether that is a plain tensor; None if nothing says so."""
    style = next(_held_by(vars(module).get("forward"), ("use_local_output",)), None)
    if style is not None:  # transformers'
        takes, gives = getattr(style, "input_layouts", None), getattr(style, "output_layouts", None)
        if takes is None and isinstance(module, nn.Embedding):
            from torch.distributed.tensor import Replicate

            takes = gives = Replicate()
        return None if takes is None or gives is None else (_one(takes), _one(gives), style.use_local_output)
    before = [p for hook in module._forward_pre_hooks.values() for p in _bound(hook) if "prepare_input" in _name(p)]
    after = [p for hook in module._forward_hooks.values() for p in _bound(hook) if "prepare_output" in _name(p)]
    if len(before) != 1 or len(after) != 1 or len(before[0].args) != 2 or len(after[0].args) != 2:
        return None
    return _one(before[0].args[0]), _one(after[0].args[0]), bool(after[0].args[1])


def _one(layouts: Any) -> Any:
    return tuple(layouts) if isinstance(layouts, (tuple, list)) else (layouts,)


def _form(module: nn.Module, layouts: Any) -> tuple[Form, int | None]:
    """The form that a tensor placed so has, and the dimension of its tokens where that is cut."""
    from torch.distributed.tensor import Replicate, Shard

    (layout,) = layouts if len(layouts) == 1 else (None,)
    if layout == Replicate():
        return "whole", None
    if type(layout) is Shard:
        return ("features", None) if layout.dim == -1 else ("sequence", layout.dim)
    raise _not_followed(module, f"inputs or outputs placed as {layouts}")


def _bound(hook: Any) -> Iterator[Any]:
    for cell in getattr(hook, "__closure__", None) or ():
        if isinstance(cell.cell_contents, partial):
            yield cell.cell_contents


def _held_by(function: Any, attributes: tuple[str, ...]) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        if all(hasattr(cell.cell_contents, attribute) for attribute in attributes):
            yield cell.cell_contents


def _name(function: partial[Any]) -> str:
    return getattr(function.func, "__name__", "")


def _not_followed(module: nn.Module, found: str) -> UnsupportedModuleError:
    return UnsupportedModuleError(
        f"{type(module).__name__}({module.extra_repr()}): expected a layer that ColwiseParallel or RowwiseParallel "
        f"shares out along one dimension of one mesh, found {found}; leave it out of the targets, or say how it is "
        "sharded with qlora_kit.layers.sharded.sharding.register_sharding"
    )
