"""Arithmetic on weights is in the dtype that is written there, whatever autocast makes of a forward around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_nothing = nullcontext()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast changes no product on ``device``. Asked for with every weight that is merged, so
    where autocast is off anyhow, as it is but for a caller within a forward, nothing is entered."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return _nothing
    return torch.autocast(device.type, enabled=False)
