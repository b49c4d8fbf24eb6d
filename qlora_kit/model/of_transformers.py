"""What transformers' models do to their own modules, under adapters."""

from __future__ import annotations

from typing import Any

from ..errors import AdapterError
from ..injection.heads import end_tables
from ..layers import AdapterLayer, ModulesToSave


def dequantize(self: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' ``dequantize`` of the base under its adapters; what it puts there is frozen as the rest is."""
    self.model.dequantize(*args, **kwargs)
    self.adapted.apply_state_()
    return self


def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The base model's own; refused while an adapter sits on the embedding or the head."""
    ends = ("get_input_embeddings", "get_output_embeddings")
    for get, module in zip(ends, end_tables(self.model), strict=True):
        if isinstance(module, (AdapterLayer, ModulesToSave)):
            raise AdapterError(
                f"resize_token_embeddings: {get}() is adapted, and its adapter has the old size; resize "
                "before applying the adapter, or merge or unload it first"
            )
    return self.model.resize_token_embeddings(*args, **kwargs)
