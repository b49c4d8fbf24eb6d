"""Bytes of memory that tensors hold, counted as operations make them and as they are freed."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class LiveBytes(TorchDispatchMode):
    """``live`` and ``peak`` bytes of all storages made inside the ``with`` block, and of those of ``model``;
    ``largest`` is the size of the largest made inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0
        self._seen: dict[int, int] = {}
        for module in model.modules():
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                self._count(tensor)
            state = getattr(getattr(module, "weight", None), "quant_state", None)
            for part in (state, getattr(state, "state2", None)):
                for value in vars(part).values() if part is not None else ():
                    self._count(value)
            for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
                self._count(getattr(holder, "SCB", None))
        self.before = self.peak = self.live

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen[key] = size
            self.live += size
            if hasattr(self, "before"):
                self.peak, self.largest = max(self.peak, self.live), max(self.largest, size)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            self._count(value)
        return out

    @property
    def extra(self) -> int:
        """The peak above what there was before and what there is now, whichever is more."""
        return self.peak - max(self.before, self.live)
