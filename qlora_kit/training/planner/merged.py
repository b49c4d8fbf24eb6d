"""What merge-aware layers hold beside the base (``layers.as_merged``): its weights as they will be after merging.

They are kept from step to step, and each is made anew in the first forward after the optimizer's step, when its
factors have changed. So a step begins with those of the step before, and what a layer makes takes the old one's place.

Not counted is what rounding one layer takes while it does: for most types it is far from the peak, which is in the
backward; the search of trellis types takes up to 0.6 GiB on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .live import LiveBytes


@contextmanager
def merged_weights(model: nn.Module, trained: list[Tensor], live: LiveBytes) -> Iterator[None]:
    """As at the start of a step that isn't the first: merged weights are there, of factors that have changed since.
    What is made for them, in the step too, counts as theirs."""
    layers: list[Any] = [m for m in model.modules() if getattr(m, "merge_aware", None)]
    for layer in layers:
        layer.merged_by = _counted(layer.merged_by, live)
    try:
        for layer in layers:
            layer.as_merged(layer.active_adapters)
        with torch.no_grad():
            for parameter in trained if layers else ():
                parameter.zero_()  # a write, as any optimizer's
        live.moments.clear()
        yield
    finally:
        for layer in layers:
            del layer.merged_by
            layer.forget_merged_()


def _counted(make: Callable[..., Any], live: LiveBytes) -> Callable[..., Any]:
    def merged_by(*args: Any) -> Any:
        before, live.kind = live.kind, "merged"
        try:
            return make(*args)
        finally:
            live.kind = before

    return merged_by
