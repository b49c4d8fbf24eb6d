"""Merge-aware adapters, computed as they will be merged or without the rounding: a switch on the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..layers import AdapterLayer


class Choice:
    """How layers compute; made, the choice holds, and at the end of a ``with`` block it is what it was before."""

    def __init__(self, layers: Iterable[AdapterLayer], enabled: bool) -> None:
        self._before: list[tuple[AdapterLayer, bool]] = []
        for layer in layers:
            self._before.append((layer, layer.computes_as_merged))
            layer.computes_as_merged = enabled

    def __enter__(self) -> None:
        """The choice is made already."""

    def __exit__(self, *error: object) -> None:
        for layer, before in self._before:
            layer.computes_as_merged = before


def set_merge_aware(self: Any, enabled: bool = True) -> Choice:
    """Have layers of merge-aware adapters (``LoraConfig.merge_aware``) compute with the weights that their merge
    leaves, the default, or as without it: the base's weight and the adapters beside it. A call, or a ``with`` block
    that sets it back: ``with lora.set_merge_aware(False): ...``. Merges are those that adapters are trained for anyway.
    """
    return Choice(self.adapted.layers().values(), enabled)
