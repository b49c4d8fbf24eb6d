"""Names that a checkpoint has of an older release, as transformers reads them: it keeps a table for each architecture.

Only plain renamings are followed. Where transformers joins or splits stored tensors on loading (experts that are stored
one by one and stacked, say), a tensor has no one name in the model.
"""

from __future__ import annotations

from typing import Any

from torch import nn


class Renamings:
    """The table for ``model``; empty for models that aren't transformers', and for releases without one."""

    def __init__(self, model: nn.Module) -> None:
        self._simple: list[Any] = []
        self._others: list[Any] = []
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightRenaming

            table = get_model_conversion_mapping(model)  # type: ignore[arg-type]
        except (ImportError, AttributeError, TypeError):
            return
        for entry in table:
            (self._simple if isinstance(entry, WeightRenaming) else self._others).append(entry)

    def __call__(self, stored: str) -> str | None:
        """What the model, or one with another prefix, calls the stored tensor; None if that is no renaming."""
        name = stored
        for entry in self._simple:
            name, _ = entry.rename_source_key(name)
        if name == stored or any(entry.rename_source_key(name)[1] is not None for entry in self._others):
            return None
        return name
