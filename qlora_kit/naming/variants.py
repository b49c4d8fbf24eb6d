"""Under which names a model may have what a checkpoint stores: those of older releases, and with another prefix.

transformers keeps a table of renamings for each architecture, by which it loads old checkpoints and names the tensors
of new ones. Only plain renamings are followed. Where it joins or splits stored tensors on loading (experts that are
stored one by one and stacked, say), a tensor has no one name in the model.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


class Variants:
    """Names under which ``model`` may have what is stored under a given one, best first: as it is or as transformers
    renames it (ViT's layers, BERT's first norms), with or without the prefix that stands before the backbone's names.

    A model that isn't transformers' has the one name.
    """

    def __init__(self, model: nn.Module) -> None:
        prefix = getattr(model, "base_model_prefix", "")
        self.prefix = f"{prefix}." if prefix else ""
        self._renamings: list[Any] = []
        transformers = sys.modules.get("transformers")  # a model of its own can't be there without it
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        # Conversions that do more than rename (experts stacked) have no tensor of one name on both sides.
        self._renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]

    def __call__(self, name: str) -> list[str]:
        if not self._renamings:
            return list(self.of_prefix(name))
        from transformers.core_model_loading import rename_source_key

        renamed, _ = rename_source_key(name, self._renamings, [])
        return [found for n in dict.fromkeys((name, renamed)) for found in self.of_prefix(n)]

    def of_prefix(self, name: str) -> tuple[str, str, str]:
        """``name``, and with or without the prefix."""
        return name, self.prefix + name, name.removeprefix(self.prefix)
