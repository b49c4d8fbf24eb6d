"""A module that stands for another: the part of ``LoraModel`` that behaves as the base model.

Unknown attributes are the model's, ``forward`` has the model's own signature, and for a transformers model
``isinstance(proxy, PreTrainedModel)`` holds. The last is done with ``__class__``, Python's own way for a proxy
to say what it stands for; it is what lets transformers' Trainer and TRL's SFTTrainer take the wrapper
unmodified, call its ``save_pretrained`` for checkpoints and read its signature. A subclass of the model's
class would not do: inherited methods would find the wrapper's ``model`` where they look for their own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from .codecs import shielded_storage

P = TypeVar("P", bound="ModelProxy")


class ModelProxy(nn.Module):
    """Wraps ``model`` and behaves as it does wherever a subclass doesn't say otherwise."""

    model: nn.Module
    # Trainers look at these to refuse a bare quantized model, or to cast its trainable weights to bfloat16.
    # What is trained here are ordinary float parameters, so the wrapper says what is true of them.
    is_quantized = False
    is_loaded_in_4bit = False
    is_loaded_in_8bit = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def base_model(self: P) -> P:
        """The wrapper itself, so that PEFT's ``model.base_model.model`` is the wrapped model here too."""
        return self

    @property
    def forward(self) -> Callable[..., Any]:  # type: ignore[override]
        """The wrapped model's call, with its signature for those who inspect it (Trainer drops columns by it)."""
        model = self.model

        @functools.wraps(model.forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        return call

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        transformers = sys.modules.get("transformers")
        model = self.__dict__.get("_modules", {}).get("model")
        if transformers is not None and isinstance(model, transformers.PreTrainedModel):
            return type(model)
        return type(self)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "model":
                raise
            return getattr(self.model, attribute)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The default would rebuild from __class__, which names the wrapped model's type.
        return _blank, (type(self),), self.__dict__

    def _get_name(self) -> str:
        return type(self).__name__

    def _apply(self: P, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P:
        # A cast to another dtype must not reach the float-typed storage of packed 4-bit weights.
        with shielded_storage(self):
            return super()._apply(fn, recurse)


def _blank(kind: type[P]) -> P:
    return kind.__new__(kind)
