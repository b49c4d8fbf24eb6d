"""Tensors set aside while a model is changed in place, on the disk, so that a large one needs no memory for it.

The first of them stay in memory: that much is nothing beside a model that matters, and a small one is done without a
file, several times as fast.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import StorageError
from .large_pages import LargePages

#: Bytes that are kept in memory before anything is written.
IN_MEMORY = 2**29


class Spill:
    """A temporary file for tensors; it is gone when the ``with`` block ends, or the process does.

    Args:
        folder: where; None is the system's folder for temporary files.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = folder or tempfile.gettempdir()
        self._room, self._pages = IN_MEMORY, LargePages()
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise StorageError(
                f"{self.folder}: expected a folder that can be written to, found none ({error}); pass scratch=FOLDER"
            ) from error

    def __enter__(self) -> Spill:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def keep(self, tree: Any) -> Callable[[], Any]:
        """Keep every tensor in ``tree`` (nested lists, tuples and dictionaries); a call that gives ``tree`` back, with
        new tensors of the same bits on the same devices.

        Raises:
            StorageError: the disk is full.
        """
        if isinstance(tree, Tensor):
            return self._of_one(tree)
        leaves, structure = tree_flatten(tree)
        kept = [self._of_one(leaf) if isinstance(leaf, Tensor) else _constant(leaf) for leaf in leaves]
        return lambda: tree_unflatten([read() for read in kept], structure)

    def _of_one(self, tensor: Tensor) -> Callable[[], Tensor]:
        if tensor.nbytes > self._room:
            return self._written(tensor)
        self._room -= tensor.nbytes
        return partial(self._pages.copy(tensor.detach()).to, tensor.device, copy=True)

    def _written(self, tensor: Tensor) -> Callable[[], Tensor]:
        shape, dtype, device = tensor.shape, tensor.dtype, tensor.device
        data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        begin, count = self._file.seek(0, os.SEEK_END), data.numel()
        try:
            self._file.write(data.numpy())  # type: ignore[arg-type]
            self._file.flush()
        except OSError as error:
            raise StorageError(
                f"{self.folder}: expected room for {count:,} more bytes, which are kept until all is done so that an "
                f"error can be undone, found none ({error}); free some, or pass scratch=FOLDER on another disk"
            ) from error

        def read() -> Tensor:
            back = torch.empty(count, dtype=torch.uint8)
            self._file.seek(begin)
            self._file.readinto(back.numpy())  # type: ignore[arg-type]
            return back.view(dtype).view(shape).to(device)

        return read


def set_data_(tensor: Tensor, before: Callable[[], Tensor]) -> None:
    """Give ``tensor`` the memory that ``before()`` returns."""
    tensor.data = before()


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value
