"""State dicts of the adapters alone.

``state_dict()`` of a ``LoraModel`` holds the base, as torch's does: gigabytes in each checkpoint of a training loop,
which never change, and of k-bit layers the codes, which sharding parts from their scales. With ``leave_base_out_`` it
holds what belongs to the adapters, and ``load_state_dict`` takes that, strictly. It works where the state dict is
asked for by someone else: accelerate's ``save_state`` and ``load_state`` with DDP and FSDP2, torch's
``distributed.checkpoint``, DeepSpeed's ``save_checkpoint``.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from ..adapter_files.slots import adapter_slots
from ..model import LoraModel
from ..naming import canonical

_HANDLES = "_handles_of_adapters_alone"


def leave_base_out_(lora: LoraModel, out: bool = True) -> LoraModel:
    """From now on ``state_dict`` of ``lora`` (or of what wraps it) holds the adapters, trained copies and biases alone,
    and ``load_state_dict`` wants no more; ``out=False`` undoes it."""
    for handle in vars(lora).pop(_HANDLES, ()):
        handle.remove()
    if out:
        handles = (lora.register_state_dict_post_hook(_keep), lora.register_load_state_dict_pre_hook(_complete))
        vars(lora)[_HANDLES] = handles
    return lora


def _own_names(lora: Any) -> set[str]:
    adapters = lora.peft_config
    names = {slot.name for adapter in adapters for slot in adapter_slots(lora.adapted, adapter)}
    return names | {f"{name.removesuffix('weight')}transposed" for name in names}  # factors that are another's


def _keep(lora: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    own = _own_names(lora)
    for key in [k for k in state if k.startswith(prefix) and canonical(k.removeprefix(prefix)) not in own]:
        del state[key]


def _complete(lora: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    """Add the base as it is, which then loads onto itself."""
    own = _own_names(lora)
    for path, module in lora.named_modules(remove_duplicate=False):
        # Of ZeRO-3's own dictionaries of parameters `|` gives an empty one.
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            name = f"{path}.{name}" if path else name
            stored = tensor is not None and name.rpartition(".")[2] not in module._non_persistent_buffers_set
            if stored and canonical(name) not in own:
                state.setdefault(prefix + name, tensor)
