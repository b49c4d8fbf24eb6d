"""What torch makes within a block, seen below autograd: the largest tensor, and bytes alive at the same time."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class largest_tensor(TorchDispatchMode):  # noqa: N801  # a context
    """Counts the tensors that operations make, views left out.

    Attributes:
        numel: elements of the largest.
        peak: most bytes of the storages made here that were alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel = self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(t) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                self._hold(tensor, given)
        return result

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        storage, key = tensor.untyped_storage(), id_of(tensor)
        if key in self._seen or key in given or not storage.nbytes():
            return
        self._seen.add(key)
        self.numel = max(self.numel, storage.nbytes() // tensor.element_size())
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, nbytes: int) -> None:
        self._seen.discard(key)
        self.alive -= nbytes


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
