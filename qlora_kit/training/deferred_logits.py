"""Logits that are computed when somebody works with them, and scored in chunks if that is all that is done.

A model's own code goes from its head's output to a loss: it scales logits, caps them, casts, shifts, flattens them,
and hands them to ``F.cross_entropy``. To know what a class of models does there, loss libraries keep a list of
classes and of fields of their configurations. Here the head answers with a tensor that writes down what is done to
it. What concerns each row alone (scaling by numbers, tanh, casts, a bias for each word) is noted and done to each
chunk; what chooses or reshapes rows is done to their numbers; and ``cross_entropy`` of that is
``chunked_cross_entropy`` of the hidden states. So whatever the class, the loss is that of its own code, with its own
shift, ``ignore_index`` and division.

Anything else done to the tensor computes it, as the head would have, gradients included. It has the dtype, device and
shape of the logits meanwhile, and one element, NaN. Who looks at a model's logits after its forward gets those of that
forward: if the head has changed in between (an optimizer's step, an adapter switched off) it is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..errors import AdapterError
from .cross_entropy import Scored, trained_in

Step = Callable[[Tensor], Tensor]

#: Functions of torch that treat all rows alike, by name without underscores and "r"; and those that write in place.
_ARITHMETIC = {"add", "sub", "mul", "div", "true_divide", "truediv", "neg", "tanh", "sigmoid", "clamp"}
_BY_ROW = _ARITHMETIC | {"multiply", "divide", "to", "float", "double", "half", "bfloat16", "contiguous", "clone"}
_IN_PLACE = {f"{name}_" for name in _ARITHMETIC} | {f"__i{name}__" for name in _ARITHMETIC}
_REVERSED = {f"__r{name}__": name for name in _ARITHMETIC}
_OF_ROWS = {"view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "narrow", "__getitem__"}
# Properties that are made of the numbers, and functions that only ask about the tensor.
_MADE_OF_IT = {"T", "mT", "H", "mH", "real", "imag", "data", "grad_fn"}
_ABOUT_IT = {"size", "dim", "ndimension", "numel", "nelement", "get_device", "is_floating_point", "__len__"}


@dataclass
class Source:
    """One call of a head.

    Attributes:
        head, forward: the module, and how it computes.
        hidden: (M, H), its input.
        chunk: rows at a time.
        losses: how often its logits were scored in chunks.
        computed_for: names of what had them computed.
    """

    head: nn.Module
    forward: Callable[[Tensor], Tensor]
    hidden: Tensor
    chunk: int
    losses: int = 0
    computed_for: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        self.state = _state(self.head)
        device = self.hidden.device.type
        if device == "meta":  # which knows no autocast
            return
        enabled = torch.is_autocast_enabled(device)
        # Without its cache: a weight that was cast under no_grad, as for the example, would be taken for training too.
        self.autocast = partial(torch.autocast, device, torch.get_autocast_dtype(device), enabled, cache_enabled=False)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The head's logits of rows, as at the time of the call.

        Raises:
            AdapterError: the head isn't what it was.
        """
        if _state(self.head) != self.state:
            raise AdapterError(
                "logits: expected the head to be as it was when the model was called, since with a chunked loss logits "
                "are computed when they are first used; found other weights, adapters or another mode; use the logits "
                "right after the call, or call the model without labels"
            )
        with self.autocast():
            return self.forward(hidden)


def _state(head: nn.Module) -> list[Any]:
    """What decides what ``head`` computes: tensors and their versions, modes, and which adapters are on."""
    tensors = [(id(t), t._version) for t in (*head.parameters(), *head.buffers()) if not t.is_inference()]
    settings = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")
    return [tensors, [(m.training, *(repr(vars(m).get(name)) for name in settings)) for m in head.modules()]]


class DeferredLogits(Tensor):
    """See the module's text. ``rows`` are the numbers of hidden states, in the shape of the logits but for words."""

    source: Source
    rows: Tensor
    steps: tuple[Step, ...]
    example: Tensor  # the logits of one row, (1, V), by which dtype and device are known
    extra: tuple[Tensor, ...]  # tensors in steps that gradients are wanted for
    value: Tensor | None  # what it is once somebody has written to it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = func.__name__ == "__get__"
        name = func.__self__.__name__ if reads or func.__name__ == "__set__" else func.__name__
        if func is F.cross_entropy:
            answer = _scored(args, kwargs)
        elif isinstance(args[0] if args else None, cls) and args[0].value is None:
            if name in _ABOUT_IT or (reads and name not in _MADE_OF_IT):
                said = super().__torch_function__(func, types, args, kwargs)
                return args[0].requires() if name == "requires_grad" else said
            answer = args[0].noted(func, name, args[1:], kwargs)
        else:
            answer = None
        return _computed(func, name, args, kwargs) if answer is None else answer

    def requires(self) -> bool:
        return any(tensor.requires_grad for tensor in (self.source.hidden, *self.trained()))

    def trained(self) -> list[Tensor]:
        return [*trained_in(self.source.head), *self.extra]

    def noted(self, func: Any, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """What ``func`` of this is, without logits being computed; None where that can't be."""
        if any(isinstance(leaf, DeferredLogits) for leaf in tree_flatten((args, kwargs))[0]):
            return None
        if name in _OF_ROWS:
            return self._chosen(func, name, args, kwargs)
        if _REVERSED.get(name, name).strip("_") in _BY_ROW and name not in _IN_PLACE:
            return self._stepped(func, args, kwargs)
        if name in _IN_PLACE:
            done = self._stepped(lambda z, *a, **k: func(z.clone(), *a, **k), args, kwargs)
            if done is not None and done.dtype == self.dtype:
                vars(self).update(vars(done))
                return self
        return None

    def _stepped(self, func: Any, args: Any, kwargs: Any) -> DeferredLogits | None:
        """This with one more step, ``func`` with numbers, dtypes, or tensors that are the same for all rows."""
        words = self.example.shape[-1]
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if any(t.shape.numel() != t.shape[-1:].numel() or t.shape[-1:] not in ((), (1,), (words,)) for t in tensors):
            return None
        flat_args, flat_kwargs = tree_map_only(Tensor, lambda t: t.reshape(t.shape[-1:]), (args, kwargs))

        def step(z: Tensor) -> Tensor:
            return func(z, *flat_args, **flat_kwargs)

        with torch.no_grad():
            example = step(self.example)
        extra = (*self.extra, *(t for t in tensors if t.requires_grad))
        return deferred(self.source, self.rows, example, (*self.steps, step), extra)

    def _chosen(self, func: Any, name: str, args: Any, kwargs: Any) -> DeferredLogits | None:
        """The rows that ``func`` chooses or arranges, if it leaves each row whole."""
        index = args[0] if name == "__getitem__" else None
        words = self.example.shape[-1]
        if isinstance(index, tuple) and any(isinstance(part, (Tensor, list)) for part in index):
            return None
        if isinstance(index, Tensor):
            places = index.dim() if index.dtype is torch.bool else 1
            return self._with_rows(self.rows[index]) if places <= self.rows.dim() else None
        # Seen as logits that are the row's number for each word, which takes no memory while words stay together.
        seen = self.rows[..., None].expand(*self.rows.shape, words)
        of_bits = any(isinstance(argument, torch.dtype) for argument in args)
        if of_bits or func(seen.to("meta"), *args, **kwargs).shape[-1:] != (words,):
            return None
        found = func(seen, *args, **kwargs)
        return self._with_rows(found[..., 0]) if found.stride(-1) == 0 else None

    def _with_rows(self, rows: Tensor) -> DeferredLogits:
        return deferred(self.source, rows.contiguous(), self.example, self.steps, self.extra)

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The head's logits of rows (n, H), with all that was done to them since."""
        logits = self.source.logits_of(hidden)
        with self.source.autocast():
            for step in self.steps:
                logits = step(logits)
        return logits

    def plain(self, name: str) -> Tensor:
        """The logits, computed for the function ``name``."""
        if self.value is not None:
            return self.value
        self.source.computed_for.append(name)
        hidden = self.source.hidden
        whole = self.rows.numel() == len(hidden) and self.rows.flatten().equal(torch.arange(len(hidden)).to(self.rows))
        logits = self.logits_of(hidden if whole else hidden[self.rows.flatten()])
        return logits.unflatten(0, self.rows.shape) if self.rows.dim() else logits.squeeze(0)


def deferred(
    source: Source, rows: Tensor, example: Tensor, steps: Sequence[Step] = (), extra: Sequence[Tensor] = ()
) -> DeferredLogits:
    """Logits of ``rows`` of ``source.hidden`` (of any shape), which ``steps`` have been done to."""
    empty = torch.full((), float("nan"), dtype=example.dtype, device=example.device)
    answer = empty.expand(*rows.shape, example.shape[-1]).as_subclass(DeferredLogits)
    vars(answer).update(source=source, rows=rows, steps=tuple(steps), example=example, extra=tuple(extra), value=None)
    return answer


def deferred_call(head: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, chunk: int) -> DeferredLogits:
    """What ``forward(hidden)`` of ``head`` is, (..., V), of hidden states (..., H); one row of it is computed."""
    rows = torch.arange(hidden.shape[:-1].numel(), device=hidden.device).view(hidden.shape[:-1])
    source = Source(head, forward, hidden.flatten(0, -2), chunk)
    with torch.no_grad():
        example = source.logits_of(source.hidden[:1])
    return deferred(source, rows, example)


_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


def _scored(args: Any, kwargs: Any) -> Tensor | None:
    """``F.cross_entropy`` in chunks; None where it asks for more than the chunked one has."""
    given = _CROSS_ENTROPY.bind(*args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    logits, target = asked["input"], asked["target"]
    is_plain = all(asked[name] is None for name in ("weight", "size_average", "reduce"))
    ours = isinstance(logits, DeferredLogits) and logits.value is None and not isinstance(target, DeferredLogits)
    if not (ours and is_plain and asked["reduction"] in ("mean", "sum") and not target.is_floating_point()):
        return None
    if logits.rows.dim() != 1 or target.shape != logits.rows.shape:
        return None
    logits.source.losses += 1
    numbers = (logits.source.chunk, asked["ignore_index"], asked["label_smoothing"])
    loss = Scored(logits.logits_of, logits.rows, target, *numbers).loss(
        logits.source.hidden, logits.trained(), asked["reduction"]
    )
    return loss.to(logits.dtype)


def _computed(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """``func`` of the logits themselves; who writes to them in place finds it there."""
    writes = func.__name__ == "__set__" or name == "__setitem__" or (name.endswith("_") and name[-2:] != "__")
    if (writes or name[:3] == "__i") and isinstance(args[0] if args else None, DeferredLogits):
        args[0].value = args[0].plain(name).clone()
    args, kwargs = tree_map_only(DeferredLogits, lambda one: one.plain(name), (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)
