"""A block's weights, read from the shards once while the block is computed many times.

Calibration stays at a block for all batches, and within it for all groups of modules that share an input. Each module
reads its own weights whenever it is called, and forgets them; what it reads is remembered here until the model goes on
to another block. Of blocks that are larger than memory is meant to hold, the part that was read first is remembered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class KeptWeights(Mapping[str, Tensor]):
    """The weights ``stored``, by name, of which those of one module at a time are kept once read.

    Args:
        limit: bytes that may be kept.
    """

    def __init__(self, stored: Mapping[str, Tensor], limit: int) -> None:
        self._stored, self._limit = stored, limit
        self._prefix: str | None = None
        self._kept: dict[str, Tensor] = {}

    @contextmanager
    def staying(self, path: str) -> Iterator[None]:
        """Inside the block, what the module at ``path`` and those inside it read is kept."""
        self._prefix = f"{path}."
        try:
            yield
        finally:
            self._prefix, self._kept = None, {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._kept:
            return self._kept[name]
        tensor = self._stored[name]
        own = self._prefix is not None and name.startswith(self._prefix)
        if own and tensor.nbytes + sum(kept.nbytes for kept in self._kept.values()) <= self._limit:
            self._kept[name] = tensor
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def keep_weights_(model: nn.Module, limit: int) -> KeptWeights:
    """Put a ``KeptWeights`` between the modules of ``model``, whose weights accelerate has left in files, and these."""
    views = [view for module in model.modules() for hook in _hooks(module) if (view := _view(hook)) is not None]
    kept = KeptWeights(views[0].dataset if views else {}, limit)
    for view in views:
        if view.dataset is kept._stored:
            view.dataset = kept
    return kept


def keep_for_good_(module: nn.Module) -> None:
    """Read the weights of ``module``, which accelerate has left in files, once and for all."""
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import set_module_tensor_to_device

    for hook in _hooks(module):
        for name in list(module._parameters) if _view(hook) is not None else ():
            set_module_tensor_to_device(module, name, hook.execution_device, value=hook.weights_map[name])
    remove_hook_from_module(module)


def _hooks(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook]))


def _view(hook: Any) -> Any:
    """The weights that ``hook`` reads from, under the names that its module has for them."""
    view = getattr(hook, "weights_map", None)
    return view if hasattr(view, "dataset") else None
