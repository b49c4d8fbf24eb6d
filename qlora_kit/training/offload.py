"""Activations that wait for the backward on the CPU.

With activation checkpointing a step keeps the input of each block: layers x batch x tokens x width numbers, 4 GiB for
32 layers, 16,384 tokens and a width of 4,096 in bfloat16, however small the adapters. They lie idle from a block's
forward to its backward, so they can lie in the machine's memory: what is left on the GPU is one block's worth. Each
is copied there and back once a step; over PCIe that is less than the block's own arithmetic from some thousand tokens
on.

torch's ``save_on_cpu`` does the copying, into pinned memory where there is a GPU. On its own it would take along all
that autograd saves, the model's weights among it, and copy on a machine without a GPU too. So it gets here what is an
activation, large, and not on the CPU. Within a checkpointed block nothing is moved: what is saved there is
checkpointing's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config.checks import check_int, check_model
from .hooked import Hooked

#: Where tensors wait, and stay if they are there already.
_CPU = "cpu"


class Offload(Hooked):
    """Activations of a model's forward are kept on the CPU. As a context it ends with the block; ``remove()`` leaves
    them where they are.

    Attributes:
        model: whose.
        least_bytes: smaller tensors stay where they are.
        moved: bytes that the last forward moved.
    """

    def __init__(self, model: nn.Module, least_bytes: int) -> None:
        super().__init__(model, (_begin, _end))
        self.model, self.least_bytes = model, least_bytes
        self._mover = _Mover(least_bytes)

    @property
    def moved(self) -> int:
        return self._mover.moved


def offload_activations(model: nn.Module, *, least_bytes: int = 1 << 20) -> Offload:
    """Keep what ``model``'s forward saves for its backward on the CPU, but for its weights and what is small.

    Loss and gradients are the same bit for bit. With activation checkpointing (``TrainingArguments`` or
    ``model.gradient_checkpointing_enable()``) one tensor a block is moved; without, all activations are, which seldom
    pays. On a machine without a GPU nothing is moved. Said again it changes ``least_bytes``.

    Args:
        model: as the training loop calls it, with adapters or without.
        least_bytes: tensors under this size aren't moved.

    Returns:
        What undoes it: ``remove()``, or a ``with`` block; ``moved`` is what the last forward moved, in bytes.

    Raises:
        ConfigError: ``model`` is no module, or ``least_bytes`` is negative.
    """
    check_model(model, "offload_activations(model)")
    check_int("least_bytes", least_bytes, 0, "leave it at 1 MiB")
    found = Offload(model, least_bytes)
    found.remove()
    model.register_forward_pre_hook(partial(_begin, mover=found._mover))
    model.register_forward_hook(partial(_end, mover=found._mover), always_call=True)
    return found


class _Mover:
    """What is moved, and the hooks of autograd's that do it while a forward runs."""

    def __init__(self, least_bytes: int) -> None:
        self.least_bytes, self.moved = least_bytes, 0
        self.weights: set[int] = set()
        self.hooks: list[Any] = []

    def pack(self, tensor: Tensor, copy: Any) -> Any:
        # With a cast, say for autocast, a weight is another tensor of the same parameter, and looks like an activation.
        weight = isinstance(tensor, nn.Parameter) or tensor.untyped_storage()._cdata in self.weights
        if weight or tensor.device.type == _CPU or tensor.nbytes < self.least_bytes:
            return tensor
        self.moved += tensor.nbytes
        return copy(tensor)


def _begin(model: nn.Module, args: Any, *, mover: _Mover) -> None:
    mover.moved = 0
    mover.weights = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    torchs = torch.autograd.graph.save_on_cpu(pin_memory=True)
    back = torchs.unpack_hook
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: mover.pack(tensor, torchs.pack_hook),
        lambda packed: packed if isinstance(packed, Tensor) else back(packed),
    )
    hooks.__enter__()
    mover.hooks.append(hooks)


def _end(model: nn.Module, args: Any, output: Any, *, mover: _Mover) -> None:
    if mover.hooks:
        mover.hooks.pop().__exit__()
