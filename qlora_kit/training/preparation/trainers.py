"""What trainers put on the model below the adapters, and its way off when the adapters leave.

A trainer that takes the wrapper for PEFT's reaches for the model inside: TRL gives it a forward of its own, others put
kernels into its modules, have activations recomputed, make the embeddings' output require a gradient. Nothing of that
is an adapter's, and none of it should stay in a model that is used or saved without them. So ``marks_of`` notes what
is there when the adapters come, and ``leave_training_`` brings it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...injection.adapted import Adapted
from ...naming import every_module
from .kbit import asks_input_gradients, checkpoints, leave_preparation_, stop_checkpointing_


@dataclass
class Marks:
    """What a model had of a trainer's: modules with a forward of their own, in place of their class's; whether
    activations were recomputed; and hooks that make the embeddings' output require a gradient."""

    forwards: list[tuple[nn.Module, Any]]
    checkpointing: bool
    input_gradients: list[tuple[nn.Module, int]]


def marks_of(model: nn.Module) -> Marks:
    """What ``model`` has of a trainer's now."""
    own = [(module, vars(module)["forward"]) for module in model.modules() if "forward" in vars(module)]
    return Marks(own, checkpoints(model), list(_gradient_hooks(model)))


def drop_forwards_(model: nn.Module, marks: Marks) -> None:
    """Give all modules of ``model`` the forward that they had.

    A module under accelerate's hooks keeps its own, for they bring its weights; so does one without a forward in its
    class, which is torch.compile's wrapper, and one that a codec of ours put right.
    """
    before = {id(module): forward for module, forward in marks.forwards}
    for module in every_module(model):
        own = vars(module)
        if "forward" not in own or _belongs(module, own["forward"]):
            continue
        if id(module) in before:
            own["forward"] = before[id(module)]
        else:
            del own["forward"]
            own.pop("_original_forward", None)


def _gradient_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    for module in every_module(model):
        for key, hook in module._forward_hooks.items():
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                yield module, key


def _belongs(module: nn.Module, forward: Any) -> bool:
    made_in = getattr(getattr(forward, "func", forward), "__module__", None) or ""
    bare = type(module).forward is nn.Module.forward
    return bare or "_hf_hook" in vars(module) or made_in.partition(".")[0] == __name__.partition(".")[0]


def leave_training_(adapted: Adapted) -> set[str]:
    """Take what trainers and ``prepare_model_for_kbit_training`` put on the model off again.

    Returns:
        Names of the parameters that required a gradient before preparing; they don't yet again.
    """
    model, marks = adapted.root, adapted.marks
    trained = leave_preparation_(model)
    if marks is not None:
        drop_forwards_(model, marks)
        stop_checkpointing_(
            model,
            recomputing=checkpoints(model) and not marks.checkpointing,
            input_gradients=asks_input_gradients(model) and not marks.input_gradients,
        )
        before = {(id(module), key) for module, key in marks.input_gradients}
        for module, key in list(_gradient_hooks(model)):  # asked for twice, transformers forgets the first
            if (id(module), key) not in before:
                del module._forward_hooks[key]
    return trained
