"""Bytes that a piece of work holds at each moment, counted as operations make tensors and as these are freed.

It sees what any code does, our adapter layers as much as a model of transformers, and it works on the meta device,
where tensors have sizes and no memory: so the peak of a training step is found by running one, at any size, in seconds.
Rejected: formulas for each architecture, which are wrong as soon as a layer saves something else, and
``saved_tensors_hooks``, which see neither what a function keeps by itself (bitsandbytes' int8) nor what is held for a
moment.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .kernels import hidden_bytes

#: What bytes are for.
KINDS = ("activations", "merged", "loss", "gradients", "backward")
Moment = tuple[int, ...]


class LiveBytes(TorchDispatchMode):
    """Counts what is made inside the ``with`` block.

    A question about values, which has no answer on the meta device, is answered with yes: every place is a token and
    none is padding, which is what models ask.

    Args:
        held: tensors that were there before, not counted.

    Attributes:
        kind: what is made from now on is for.
        moments: bytes by ``KINDS`` after each operation that made something.
    """

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.kind = "activations"
        self.moments: list[Moment] = []
        self.assumed = 0
        self._now = dict.fromkeys(KINDS, 0)
        self._kinds: dict[int, str | None] = {}
        self._watched: dict[int, Any] = {}
        for tensor in held:
            self._note(tensor, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].is_meta and (answer := _YES.get(func)) is not None:
            self.assumed += func not in _OWN and self.kind != "loss"  # there it is which tokens count
            return answer(*args)
        if func is _INDEX and args[0].is_meta and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.assumed += self.kind != "loss"
            args = (args[0], _places(args[1]))
        out = func(*args, **(kwargs or {}))
        made = 0
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                made += self._note(value, self.kind)
        passing = hidden_bytes(func, args)
        if made or passing:
            now = {**self._now, self.kind: self._now[self.kind] + passing}
            self.moments.append(tuple(now.values()))
        return out

    def becomes(self, tensor: Tensor, kind: str) -> None:
        """Count what ``tensor`` holds as ``kind`` from now on."""
        key = tensor.untyped_storage()._cdata
        if (old := self._kinds.get(key)) is not None:
            self._now[old] -= tensor.untyped_storage().nbytes()
            self._now[kind] += tensor.untyped_storage().nbytes()
            self._kinds[key] = kind

    def _note(self, tensor: Tensor, kind: str | None) -> int:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._kinds:
            return 0
        self._kinds[key] = kind
        if kind is not None:
            self._now[kind] += size

        def gone(_: Any) -> None:
            del self._watched[key]
            if (last := self._kinds.pop(key)) is not None:
                self._now[last] -= size

        self._watched[key] = weakref.ref(storage, gone)
        return size


_INDEX = torch.ops.aten.index.Tensor
_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default  # of factors that nothing was written to since
_OWN = (_ITEM, _EQUAL)


def _all_places(mask: Tensor) -> Tensor:
    return mask.new_zeros((mask.numel(), mask.dim()), dtype=torch.int64)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Numbers of places for each mask among ``indices``, one tensor for each of its dimensions."""
    found: list[Tensor | None] = []
    for index in indices:
        masks = index is not None and index.dtype == torch.bool
        found += _all_places(index).unbind(1) if masks else [index]  # type: ignore[arg-type]
    return found


_YES: dict[Any, Callable[..., Any]] = {
    _ITEM: lambda x: True if x.dtype == torch.bool else 1,
    _EQUAL: lambda x, y: True,
    torch.ops.aten.nonzero.default: _all_places,
}
