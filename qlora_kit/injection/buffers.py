"""Buffers that training moves: BatchNorm's running statistics, and whatever else a forward in training mode writes.

They are no parameters, and yet a model computes with them in evaluation: an adapter without those it was trained with
is another adapter, and a base with them another base. So they belong to the adapter that was active when they moved,
as trained biases do to theirs: shown in the model while it is, set aside for another's or for the base's own, stored
in its file under the base's names (which PEFT reads into the base).

Of each persistent buffer the value from before the first adapter is kept; what differs from it has moved. Packed
weights are buffers too, and never move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..codecs import registered_codec
from ..naming import StandIn, Tree, base_of


class MovedBuffers:
    """The buffers of ``model`` from before training, and what each adapter made of them.

    Attributes:
        base: the values without adapters, by name.
        moved: those that aren't the base's, by adapter, of adapters that aren't shown.
        shown: the adapters whose buffers are in the model now; where several have moved one, the first's.
    """

    def __init__(self, model: nn.Module) -> None:
        self.base = {name: buffer.detach().clone() for name, buffer in _live(model).items()}
        self.moved: dict[str, dict[str, Tensor]] = {}
        self.shown: list[str] = []
        self.placed: dict[str, Tensor] = {}  # what was put there for several at once: until it moves, its own's alone

    def of(self, model: nn.Module, adapter: str) -> dict[str, Tensor]:
        """The buffers that ``adapter`` has moved, by name; the model's own tensors while it is shown."""
        if adapter not in self.shown:
            return dict(self.moved.get(adapter, {}))
        live = _live(model) if self.base else {}
        found = {name: live[name] for name, kept in self.base.items() if name in live and _differ(live[name], kept)}
        own = self.moved.get(adapter, {})
        still = [name for name in self.placed if name in live and not _differ(live[name], self.placed[name])]
        return {**{name: t for name, t in found.items() if name not in still}, **{n: own[n] for n in still if n in own}}

    def originals(self, model: nn.Module) -> dict[int, Tensor]:
        """The base's values of the buffers that the adapters shown have moved, by the id of the model's own tensor."""
        live = _live(model) if self.shown else {}
        moved = [name for name in live if name in self.base and _differ(live[name], self.base[name])]
        return {id(live[name]): self.base[name].to(live[name].device, live[name].dtype) for name in moved}

    def place(self, model: nn.Module, adapter: str, name: str) -> Tensor:
        """The tensor to write the value of buffer ``name`` of ``adapter`` into."""
        if adapter in self.shown:
            return _live(model)[name]
        own = self.moved.setdefault(adapter, {})
        return own.setdefault(name, self.base[name].clone())

    @torch.no_grad()
    def show_(self, model: nn.Module, adapters: Sequence[str]) -> None:
        """Put the buffers of ``adapters`` into the model, and set aside those of the adapters shown before."""
        if not self.base or list(adapters) == self.shown:
            return
        moved = {adapter: self.of(model, adapter) for adapter in self.shown}
        for adapter, tensors in moved.items():
            self.moved[adapter] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        wanted = dict(self.base)
        for adapter in reversed(adapters):
            wanted.update(self.moved.get(adapter, {}))
        for name, buffer in _live(model).items():
            value = wanted.get(name)
            if value is not None and value.shape == buffer.shape and _differ(buffer, value):
                buffer.copy_(value)
        self.shown = list(adapters)
        self.placed = {name: value.clone() for name, value in wanted.items()} if len(self.shown) > 1 else {}

    def forget_(self, adapter: str) -> None:
        """Drop what ``adapter``, which isn't shown any more, has moved."""
        self.moved.pop(adapter, None)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """In the block a forward in training mode may move buffers of ``model``; afterwards all are as before."""
    before = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        if not _is_packed(module)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                buffer.copy_(value)
                module._buffers[name] = buffer


def _live(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of ``model`` by name, those of packed weights left out."""
    found = {}
    for path, module in Tree(model).firsts():
        base = base_of(module)
        # A stand-in isn't entered by the tree, and may stand for more than one module.
        parts = base.named_modules(prefix=path) if isinstance(module, StandIn) else [(path, base)]
        for at, part in parts:
            if not _is_packed(part):
                for name, buffer in part._buffers.items():
                    if buffer is not None and name not in part._non_persistent_buffers_set:
                        found[f"{at}.{name}" if at else name] = buffer
    return found


def _is_packed(module: nn.Module) -> bool:
    """Whether the buffers of ``module`` are a weight, in a format of ours or in one with matrices of integers."""
    if not module._buffers:
        return False
    matrices = (b for b in module._buffers.values() if b is not None and b.dim() > 1)
    return registered_codec(module) is not None or any(not b.is_floating_point() for b in matrices)


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return False
    return one.shape != other.shape or not torch.equal(one, other.to(one.device, one.dtype))
