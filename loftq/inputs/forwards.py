"""A module's forward, exchanged for another for a while."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch import nn


def forward_exchanged_(
    module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Have ``module`` compute what ``make`` gives for its own forward; a call that takes it back."""
    own: Any = vars(module).get("forward")
    module.forward = make(module.forward)

    def undo() -> None:
        if own is not None:
            module.forward = own
        else:
            with suppress(AttributeError):
                del module.forward

    return undo
