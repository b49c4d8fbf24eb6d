"""A value of any kind on its way to another process of the same run: what surrounds its tensors, pickled, and these.

Only processes that were started together hand each other such values; nothing that lies in a file is unpickled.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor


class _Apart(pickle.Pickler):
    """Pickles what surrounds tensors, and keeps them aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)]


class _Together(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: Any) -> Tensor:
        return self._tensors[place]


def taken_apart(value: Any) -> tuple[bytes, list[Tensor]]:
    """``value`` without its tensors, and these as bytes on the CPU, uint8 (n,)."""
    file = io.BytesIO()
    pickler = _Apart(file)
    pickler.dump(value)
    shapes = [(tensor.dtype, tuple(tensor.shape)) for tensor in pickler.tensors]
    flat = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in pickler.tensors]
    return pickle.dumps((shapes, file.getvalue())), flat


def room_for(head: bytes) -> list[Tensor]:
    """Where the bytes of the tensors go that ``head`` came without."""
    return [torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8) for dtype, shape in pickle.loads(head)[0]]


def put_together(head: bytes, flat: Sequence[Tensor]) -> Any:
    """The value that ``taken_apart`` took apart."""
    shapes, around = pickle.loads(head)
    tensors = [part.view(dtype).view(shape) for part, (dtype, shape) in zip(flat, shapes, strict=True)]
    return _Together(io.BytesIO(around), tensors).load()
