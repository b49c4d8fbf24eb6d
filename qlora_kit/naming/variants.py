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
        self._conversions: list[Any] = []
        transformers = sys.modules.get("transformers")  # a model of its own can't be there without it
        if transformers is None or not isinstance(model, transformers.PreTrainedModel):
            return
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        # Conversions that do more than rename (experts stacked) have no tensor of one name on both sides.
        steps = get_model_conversion_mapping(model)
        self._renamings = [step for step in steps if isinstance(step, WeightRenaming)]
        self._conversions = [step for step in steps if isinstance(step, WeightConverter)]

    def __call__(self, name: str) -> list[str]:
        return [found for n in dict.fromkeys((name, self.renamed(name))) for found in self.of_prefix(n)]

    def renamed(self, name: str) -> str:
        """What transformers renames ``name`` to on loading, and back on saving; often the same."""
        if not self._renamings:
            return name
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self._renamings, [])[0])

    def made_of(self, name: str) -> list[str]:
        """The model's names of what transformers makes of the stored ``name`` and others together; often none."""
        from_renamed = self.renamed(name)
        for step in self._conversions:
            made, matched = step.rename_source_key(from_renamed)
            if matched is not None:
                first = step.target_patterns[0]
                ends = [made.replace(first, target) for target in step.target_patterns]
                return [found for end in ends for found in self.of_prefix(end)]
        return []

    def of_prefix(self, name: str) -> tuple[str, str, str]:
        """``name``, and with or without the prefix."""
        return name, self.prefix + name, name.removeprefix(self.prefix)
