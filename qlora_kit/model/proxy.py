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
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..codecs import shielded_storage
from ..errors import AdapterError
from ..injection.ties import end_tables
from ..layers import AdapterLayer
from .keywords import without_peft_keywords

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
    def forward(self) -> Callable[..., Any]:
        """The wrapped model's call, with its signature for those who inspect it (Trainer drops columns by it)."""
        model, forward = self.model, self.model.forward

        @functools.wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs = without_peft_keywords(kwargs, forward)
            # Who has replaced the model's forward since means the one from before, not itself once more.
            return model(*args, **kwargs) if model.forward == forward else forward(*args, **kwargs)

        # In the method's place may be a plain callable, as accelerate's hooks are; torch.compile can't make methods.
        if torch.compiler.is_compiling() or not isinstance(forward, MethodType):
            return call

        @functools.wraps(forward.__func__)
        def method(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # Accelerate takes the function out of a method, and binds it to the model again.
            return (call if owner is self else MethodType(forward.__func__, owner))(*args, **kwargs)

        return MethodType(method, self)

    @forward.setter
    def forward(self, replacement: Callable[..., Any]) -> None:
        """Mixed precision and SFTTrainer replace a model's forward; given to the wrapper it goes to the model.

        A method of the wrapper becomes one of the model, whose ``base_model`` is the backbone it looks for.
        """
        function = getattr(replacement, "__func__", None)
        if function is None or getattr(replacement, "__self__", None) is not self:
            self.model.forward = replacement
            return
        code = getattr(function, "__code__", None)
        if code is not None and any("lm_head" in name for name in (*code.co_varnames, *code.co_freevars)):
            self._check_head_is_read_whole()
        if isinstance(getattr(function, "__wrapped__", None), property):  # copied from this class
            functools.update_wrapper(function, type(self.model).forward)
        self.model.forward = MethodType(function, self.model)

    def _check_head_is_read_whole(self) -> None:
        """TRL multiplies by ``lm_head.weight`` itself; an adapter on the head would be ignored in silence."""
        if isinstance(end_tables(self.model)[1], AdapterLayer):
            raise AdapterError(
                "this trainer computes its loss from the output head's weight and never calls the head, so the "
                "adapter on it would not train; take the head out of target_modules, or train it whole with "
                "modules_to_save"
            )

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
            found = getattr(self.model, attribute)
            return _guarded(found) if attribute == "generate" else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The default would rebuild from __class__, which names the wrapped model's type.
        return _blank, (type(self),), self.__dict__

    def __repr__(self) -> str:
        # nn.Module's begins with _get_name(), by which Trainer tells a causal model when it smooths labels.
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def _apply(self: P, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P:
        # A cast to another dtype must not reach the float-typed storage of packed 4-bit weights.
        with shielded_storage(self):
            return super()._apply(fn, recurse)


def _blank(kind: type[P]) -> P:
    return kind.__new__(kind)


def _guarded(generate: Callable[..., Any]) -> Callable[..., Any]:
    """The wrapped model's ``generate``, which refuses PEFT's keywords as ``forward`` does."""

    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        return generate(*args, **without_peft_keywords(kwargs, generate))

    return call
