"""A module that stands for another: the part of ``LoraModel`` that behaves as the base model.

Unknown attributes are the model's, ``forward`` has the model's own signature, and for a transformers model
``isinstance(proxy, PreTrainedModel)`` holds. The last is done with ``__class__``, Python's own way for a proxy
to say what it stands for; it is what lets transformers' Trainer and TRL's SFTTrainer take the wrapper
unmodified, call its ``save_pretrained`` for checkpoints and read its signature. A subclass of the model's
class would not do: inherited methods would find the wrapper's ``model`` where they look for their own. In the same way
``isinstance(proxy, peft.PeftModel)`` holds where peft is imported: by it trainers tell that a model can switch its
adapters off, and so be its own reference (``neighbours.passing``).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..codecs import registered_codec, shielded_storage
from ..compat.neighbours.passing import blank, in_place_of, loaded, standing_for
from ..config.checks import check_model
from ..errors import AdapterError, CodecError
from ..injection.ties import end_tables
from ..layers import AdapterLayer
from ..training.preparation.sharding import check_sharded
from ..training.preparation.trainers import drop_forwards_
from .keywords import without_peft_keywords
from .replaced import chain, decorated, settings_of
from .row_adapters import call_with_rows

P = TypeVar("P", bound="ModelProxy")


class ModelProxy(nn.Module):
    """Wraps ``model`` and behaves as it does wherever a subclass doesn't say otherwise."""

    model: nn.Module
    #: The submodule's name that ``model`` is, which names of parameters begin with.
    held_under: ClassVar[str] = "model"
    #: What PEFT says of LoRA: names of its parameters within a layer begin so, and a layer alone has all that it needs.
    prefix: ClassVar[str] = "lora_"
    uses_shared_state: ClassVar[bool] = False
    # Trainers look at these to refuse a bare quantized model, or to cast its trainable weights to bfloat16.
    # What is trained here are ordinary float parameters, so the wrapper says what is true of them.
    is_quantized = False
    is_loaded_in_4bit = False
    is_loaded_in_8bit = False

    def __init__(self, model: nn.Module) -> None:
        check_model(model, "apply_lora(model, config)")
        super().__init__()
        self.model = model

    @property
    def base_model(self: P) -> P:
        """The wrapper itself, so that PEFT's ``model.base_model.model`` is the wrapped model here too."""
        return self

    @property
    def forward(self) -> Callable[..., Any]:
        """The wrapped model's call, with its signature for those who inspect it (Trainer drops columns by it)."""
        function = self.__dict__.get(_REPLACED) or _own(self.model.forward, self)
        if torch.compiler.is_compiling():  # which can't make methods
            return lambda *args, **kwargs: function(self, *args, **kwargs)
        return MethodType(function, self)

    @forward.setter
    def forward(self, replacement: Callable[..., Any]) -> None:
        """Mixed precision and SFTTrainer replace a model's forward; what is given to the wrapper stays on it.

        So the model below computes as ever, and copies of the wrapper don't compute with the original.
        """
        function = replacement.__func__ if getattr(replacement, "__self__", None) is self else None  # type: ignore[attr-defined]
        found = chain(function or replacement, _ENDS)
        if found is None:
            function = _given(replacement) if function is None else self._of_model(function)
        else:
            layers, end = found
            settings, end = settings_of(layers), getattr(end, "__func__", end)
            if settings is not None:  # those that an earlier trainer put there don't count twice
                function = None if not settings and end.__code__ is _OWN else decorated(end, settings)
            elif function is None:
                function = _given(replacement)
        self.__dict__[_REPLACED] = function

    @forward.deleter
    def forward(self) -> None:
        self.__dict__.pop(_REPLACED, None)

    def _of_model(self, function: Any) -> Callable[..., Any] | None:
        """A method that TRL makes of ``function`` for the wrapper is one of the model, whose ``base_model`` is the
        backbone that it looks for. None where it is the model's own forward, put back."""
        if function in _unwrapped(type(self.model).forward):
            return None
        code = getattr(function, "__code__", None)
        if code is not None and any("lm_head" in name for name in (*code.co_varnames, *code.co_freevars)):
            self._check_head_is_read_whole()
        if isinstance(getattr(function, "__wrapped__", None), property):  # copied from this class
            functools.update_wrapper(function, type(self.model).forward)
        return _below(function)

    def _check_head_is_read_whole(self) -> None:
        """TRL multiplies by ``lm_head.weight`` itself; an adapter on the head would be ignored in silence."""
        if isinstance(end_tables(self.model)[1], AdapterLayer):
            raise AdapterError(
                "this trainer computes its loss from the output head's weight and never calls the head, so the "
                "adapter on it would not train; take the head out of target_modules, or train it whole with "
                "modules_to_save"
            )

    @property
    def __class__(self) -> type:
        transformers = sys.modules.get("transformers")
        model = self.__dict__.get("_modules", {}).get(type(self).held_under)
        passes = transformers is not None and isinstance(model, transformers.PreTrainedModel)
        own, theirs = type(model) if passes else type(self), loaded("peft", "PeftModel")
        return own if theirs is None else standing_for(own, theirs)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        own: Any = type(self)
        # FSDP2 puts a class of its own before the one that it was shown; here it goes before the wrapper's.
        object.__dict__["__class__"].__set__(self, in_place_of(kind, self.__class__, own))
        check_sharded(self)

    def __setattr__(self, attribute: str, value: Any) -> None:
        super().__setattr__(self.held_under if attribute == "model" else attribute, value)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(type(self).held_under if attribute == "model" else attribute)
        except AttributeError:
            if attribute == "model":
                raise
            found = getattr(self.model, attribute)
            if attribute == "get_output_embeddings":
                # By its type trainers see an adapter on the head, whose weight they read past it; not in a wrapper.
                head = end_tables(self.model)[1]
                return (lambda: head) if isinstance(head, AdapterLayer) else found
            return _guarded(found, self) if attribute in ("generate", "generate_batch") else found

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The default would rebuild from __class__, which names the wrapped model's type.
        state = {key: value for key, value in vars(self).items() if key not in (_REPLACED, "_original_forward")}
        found = chain(self.__dict__.get(_REPLACED), _ENDS)
        return blank, (type(self),), {**state, _SETTINGS: found and settings_of(found[0])}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = state.pop(_SETTINGS, None)
        super().__setstate__(state)
        # What a trainer put on the model may compute with the original's weights. A bare model whose adapters this one
        # manages is still without its modules here; it is copied as it is.
        marks = getattr(vars(self).get("adapted"), "marks", None)
        if marks is not None and "_modules" in vars(self.model):
            drop_forwards_(self.model, marks)
        if settings:
            self.__dict__[_REPLACED] = decorated(_own(self.model.forward, self), settings)

    def __repr__(self) -> str:
        # nn.Module's begins with _get_name(), by which Trainer tells a causal model when it smooths labels.
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Here and not in load_state_dict, since DDP's and torch.compile's wrappers come past that.
        own = f"{prefix}{self.held_under}"
        for path, module in self.model.named_modules(prefix=own, remove_duplicate=False):
            codec = registered_codec(module)
            if codec is not None:
                try:
                    codec.load_(module, state_dict, f"{path}.")
                except CodecError as error:  # torch raises it at the end; until then the module is as it was
                    error_msgs.append(str(error))
                    for key in [key for key in state_dict if key.startswith(f"{path}.")]:
                        del state_dict[key]
                    state_dict.update({f"{path}.{name}": value for name, value in module._parameters.items()})
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, False, missing_keys, unexpected_keys, error_msgs
        )
        # torch's own takes the first part of a key for a child's name, which may have a dot here. There are no tensors
        # beside that child's.
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and not k.startswith(f"{own}.")]

    def _apply(self: P, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> P:
        # A cast to another dtype must not reach the float-typed storage of packed 4-bit weights.
        with shielded_storage(self):
            return super()._apply(fn, recurse)


def _own(forward: Any, wrapper: Any = None) -> Callable[..., Any]:
    """The forward of ``wrapper``, whose model's is ``forward``, as a function that takes it, or a copy of it."""
    function = getattr(forward, "__func__", None)

    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs, names = without_peft_keywords(kwargs, forward)
        if names is not None:
            return call_with_rows(owner, names, functools.partial(method, owner), args, kwargs, forward)
        if not issubclass(type(owner), ModelProxy):
            return MethodType(function, owner)(*args, **kwargs)  # type: ignore[arg-type]
        # Who has replaced the model's forward since means the one from before, not itself once more.
        model, now = owner.model, owner.model.forward
        if getattr(now, "__func__", now) is (function or forward) or (function is None and owner is not wrapper):
            return model(*args, **kwargs)
        return (forward if function is None else MethodType(function, model))(*args, **kwargs)

    return method if forward is None else functools.wraps(function or forward)(method)


def _below(function: Any) -> Callable[..., Any]:
    """``function``, which takes the model, as one that takes the wrapper."""

    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return function(owner.model, *args, **kwargs)

    return functools.update_wrapper(method, function)


def _given(function: Any) -> Callable[..., Any]:
    """``function``, which takes neither, as one that takes the wrapper."""

    def method(owner: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return functools.update_wrapper(method, function)


# Where what is around a wrapper's forward ends.
_OWN = _own(None).__code__
_ENDS = frozenset((_OWN, _below(None).__code__, _given(None).__code__))
_REPLACED, _SETTINGS = "_replaced_forward", "_forward_settings"


def _unwrapped(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _guarded(generate: Callable[..., Any], wrapper: Any) -> Callable[..., Any]:
    """The wrapped model's ``generate``, which takes and refuses PEFT's keywords as ``forward`` does."""

    @functools.wraps(generate)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs, names = without_peft_keywords(kwargs, generate)
        if names is None:
            return generate(*args, **kwargs)
        if generate.__name__ != "generate":
            raise AdapterError(f"{generate.__name__}: it packs rows into one, which have one adapter; call generate")
        return call_with_rows(wrapper, names, generate, args, kwargs, generate)

    return call
