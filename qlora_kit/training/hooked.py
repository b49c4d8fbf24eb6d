"""What two hooks around a module's forward do, until it is removed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T", bound="Hooked")


class Hooked:
    """Base of what is in use while hooks stand on a module. As a context it ends with the block."""

    def __init__(self, module: nn.Module, calls: tuple[Callable[..., Any], ...]) -> None:
        self._hooked, self._calls = module, calls

    def own(self, hooks: Mapping[int, Any]) -> dict[int, Any]:
        """Those of ``hooks`` that are partial calls of ours."""
        return {key: hook for key, hook in hooks.items() if getattr(hook, "func", None) in self._calls}

    def remove(self) -> None:
        """Leave the module's forward as it was; does nothing the second time."""
        module = self._hooked
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in self.own(hooks):
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
