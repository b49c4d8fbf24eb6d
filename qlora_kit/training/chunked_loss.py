"""``use_chunked_loss``: a model's own loss, computed without holding the logits of all tokens.

While a forward with labels runs, the model's output head answers with logits that are computed when somebody works
with them (``deferred_logits``); a cross-entropy of them is computed in chunks (``cross_entropy``). The model's code
is its own, and so is its loss: shift, ``ignore_index``, ``num_items_in_batch``, further terms. Without labels, and so
in ``generate``, nothing differs. The head is asked for at each call, by ``get_output_embeddings``: it may be dense or
of few bits, have adapters or be trained whole, be tied to the embeddings, and change between calls.

Two hooks around the model's forward do it, which deepcopy, pickle and wrappers (DDP, ``LoraModel``) leave alone.
Between forwards the head is as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import protect_storage_
from ..errors import UnsupportedModuleError
from ..injection.ties import end_tables
from ..layers import AdapterLayer, ModulesToSave
from ..layers.row_choice import rows_of
from .cross_entropy import CHUNK, check_chunk
from .deferred_logits import deferred_call
from .hooked import Hooked
from .loss_probe import probe


class ChunkedLoss(Hooked):
    """A chunked loss in use. As a context it ends with the block; ``remove()`` lets the model compute its loss as ever.

    Attributes:
        module: the model with labels and a head, inside of what was given.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, (_begin, _end))
        self.module = module

    @property
    def chunk(self) -> int | None:
        """Rows at a time; None when it isn't in use any more."""
        return next((hook.keywords["chunk"] for hook in self.own(self.module._forward_pre_hooks).values()), None)


def use_chunked_loss(model: nn.Module, *, chunk: int = CHUNK, batch: Mapping[str, Any] | None = None) -> ChunkedLoss:
    """Have ``model(..., labels=...)`` compute its loss from ``chunk`` tokens' logits at a time.

    The loss and all gradients are those of the model's own code, to what ``chunked_cross_entropy`` says of them. That
    is tried here on a batch of a few tokens, both ways. ``outputs.logits`` are computed if they are used. Tokens
    whose label is ignored cost nothing. Said again it changes ``chunk``; on an error the model is as it was.

    Nothing is saved where a loss is computed from logits outside of the model: transformers' ``label_smoothing_factor``
    and ``compute_loss_func``. TRL's SFTTrainer computes its own in chunks from 1.16 on, and is not disturbed. Under
    torch.compile, and where each row has adapters of its own in the head, it computes as ever.

    Args:
        model: any whose forward takes ``labels`` and which has output embeddings, bare, with adapters, or wrapped.
        chunk: how many tokens' logits are held at a time. More are faster where the head is of few bits.
        batch: keyword arguments of the forward to try, ``labels`` among them. By default random ``input_ids``.

    Returns:
        What undoes it: ``remove()``, or a ``with`` block.

    Raises:
        ConfigError: a ``chunk`` under one.
        UnsupportedModuleError: no head, or a model that uses its logits in a way that can't be chunked, or whose loss
            comes out different; it says what was found.
    """
    check_chunk(chunk)
    module = _with_labels(model)
    used = ChunkedLoss(module)
    before = used.chunk
    used.remove()
    protect_storage_(module)  # an evaluation would rewrite 4-bit weights on some CPUs
    try:
        probe(module, partial(use_untried, module, chunk), batch)
    except BaseException:
        used.remove()
        if before is not None:
            use_untried(module, before)
        raise
    return used


def use_untried(model: nn.Module, chunk: int = CHUNK) -> ChunkedLoss:
    """``use_chunked_loss`` of a model for which it was tried before."""
    module = _with_labels(model)
    module.register_forward_pre_hook(partial(_begin, chunk=chunk), with_kwargs=True)
    module.register_forward_hook(partial(_end, chunk=chunk), always_call=True)
    return ChunkedLoss(module)


def _with_labels(model: nn.Module) -> nn.Module:
    """The first module in ``model`` whose class has output embeddings and takes labels.

    Raises:
        UnsupportedModuleError: there is none, or it has no head.
    """
    for module in model.modules():
        if hasattr(type(module), "get_output_embeddings") and "labels" in _parameters(type(module)):  # type: ignore[arg-type]
            if end_tables(module)[1] is None:
                break
            return module
    raise UnsupportedModuleError(
        f"{type(model).__name__}: expected a forward that takes labels and get_output_embeddings() that gives a "
        "head over words, found none; call chunked_cross_entropy(hidden, head, target) in your own loss"
    )


@cache
def _parameters(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)


class _Deferring:
    """The forward of a head while its model's runs."""

    def __init__(self, head: nn.Module, chunk: int) -> None:
        self.head, self.chunk = head, chunk
        self.before = vars(head).get("forward")  # such as accelerate's, which brings the weights

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.head).forward.__get__(self.head) if self.before is None else self.before
        if args or kwargs or not isinstance(hidden, Tensor) or not hidden.numel() or _by_rows(self.head):
            return forward(hidden, *args, **kwargs)
        return deferred_call(self.head, forward, hidden, self.chunk)

    def end(self) -> None:
        if self.before is None:
            vars(self.head).pop("forward", None)
        else:
            vars(self.head)["forward"] = self.before


def _by_rows(head: nn.Module) -> bool:
    """Whether each row of the batch has an adapter of its own in ``head``: chunks don't know which row they are of."""
    return any(rows_of(part) is not None for part in head.modules() if isinstance(part, (AdapterLayer, ModulesToSave)))


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, chunk: int) -> None:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    names = _parameters(type(module))  # type: ignore[arg-type]
    labels = dict(zip(names[1:], args, strict=False)).get("labels", kwargs.get("labels"))
    head = end_tables(module)[1]
    if labels is None or head is None:
        return
    if not isinstance(vars(head).get("forward"), _Deferring):
        vars(head)["forward"] = _Deferring(head, chunk)


def _end(module: nn.Module, args: tuple[Any, ...], output: Any, *, chunk: int) -> None:
    if torch.compiler.is_compiling():
        return
    head = end_tables(module)[1]
    forward = None if head is None else vars(head).get("forward")
    if isinstance(forward, _Deferring):
        forward.end()
