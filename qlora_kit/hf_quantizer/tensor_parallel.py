"""Modules of few bits in a model that ``from_pretrained(tp_plan=...)`` shares out to several processes.

transformers cuts each parameter that its plan names as a dense one: the packed codes of a weight in equal pieces of one
long row, and the scales beside them, which aren't parameters, not at all. Such a model loads without a word, and
computes something else. So the plan is taken aside for these modules; each process loads them whole, keeps its part,
and has it move activations as the plan says. Until then a process holds all of the packed weights.

What it keeps is no DTensor, so transformers would save a part as if it were the whole; that is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import CodecError, StorageError, TargetError
from ..layers.sharded.moving import moving_as_
from ..layers.sharded.sharding import Sharding, sharding_of
from ..layers.sharded.whole import part_of_module

#: Of transformers' styles: along which dimension they cut a linear's weight, what it is given and what it gives.
STYLES: dict[str, tuple[Any, Any, Any]] = {
    "colwise": ("column", "whole", "features"),
    "colwise_gather_output": ("column", "whole", "whole"),
    "colwise_rep": ("column", "whole", "whole"),
    "rowwise": ("row", "features", "whole"),
    "rowwise_split_input": ("row", "whole", "whole"),
    "rowwise_rep": ("row", "whole", "whole"),
}


def taken_aside(model: nn.Module, plan: dict[str, str], paths: list[str]) -> dict[str, str]:
    """The styles of the modules at ``paths`` by their path, which are no longer in ``plan``.

    Raises:
        TargetError: other modules have the same name in the plan, and are dense.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as in_plan

    mine = {path: in_plan(path) for path in paths if in_plan(path) in plan}
    for path, module in model.named_modules():
        if in_plan(path) in mine.values() and path not in mine:
            raise TargetError(
                f"{path}: expected one storage for all modules that the plan calls {in_plan(path)!r}, found a dense "
                f"{type(module).__name__} beside some of few bits; quantize all of them, or load without tp_plan"
            )
    found = {path: plan[name] for path, name in mine.items()}
    for name in set(mine.values()):
        del plan[name]
    return found


def refuse_saving_(model: Any, modules: Iterable[nn.Module]) -> None:
    """Have ``model.save_pretrained`` say why it can't, where one of ``modules``, of few bits, is a part."""
    if hasattr(type(model), "save_pretrained") and any(sharding_of(module) is not None for module in modules):
        model.save_pretrained = _not_saved


def _not_saved(*args: Any, **kwargs: Any) -> None:
    raise StorageError(
        "save_pretrained: expected weights of few bits that this process holds whole, found layers that several "
        "processes share; quantize and save the model in one process (from_pretrained(folder, tp_plan='auto') shares "
        "that out), and save adapters with save_pretrained of the LoraModel"
    )


def share_out_(model: Any, styles: dict[str, str]) -> None:
    """Have each process keep its part of the modules at the paths of ``styles``, if ``model`` is shared out.

    Raises:
        TargetError: a style that cuts no linear.
        CodecError: few bits that can't be cut there; says what can.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard as in_plan

    if (getattr(model, "_tp_size", None) or 1) > 1:
        mesh = model._mesh_manager.get_mesh("tp")
        for path, style in styles.items():
            if style not in STYLES:
                raise TargetError(
                    f"{path}: expected one of {sorted(STYLES)} in the plan for a linear layer of few bits, found "
                    f"{style!r}; leave it out of the plan with DistributedConfig(tp_plan=...), or load without one"
                )
            module = model.get_submodule(path)
            kind, takes, gives = STYLES[style]
            shape = (module.out_features, module.in_features)
            how = Sharding(kind, shape, mesh.get_group(), takes=takes, gives=gives, mesh=mesh)
            parent, _, name = path.rpartition(".")
            try:
                setattr(model.get_submodule(parent), name, moving_as_(part_of_module(module, how), how))
            except CodecError as error:
                raise CodecError(f"{path}: {error}") from error
        refuse_saving_(model, map(model.get_submodule, styles))
    model._tp_plan.update({in_plan(path): style for path, style in styles.items()})
