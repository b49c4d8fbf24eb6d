"""A layer as it was before merging, for a moment."""

from __future__ import annotations

from typing import Any


class Unmerged:
    """Swap a layer's unmerged weight in for the duration of a ``with`` block."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        layer = self.layer
        if layer._unmerged is not None:
            self.merged = layer.codec.snapshot(layer.base_layer)
            layer.codec.restore_(layer.base_layer, layer._unmerged)

    def __exit__(self, *_: object) -> None:
        layer = self.layer
        if layer._unmerged is not None:
            layer.codec.restore_(layer.base_layer, self.merged)
