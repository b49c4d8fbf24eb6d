"""One training step on a model without values: a batch, the forward, the loss and the backward."""

from __future__ import annotations

import gc
import inspect
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints.model_folder import task_of
from ...errors import ConfigError, UnsupportedModuleError
from ...injection.ties import end_tables
from ..chunked_loss import use_chunked_loss, use_untried
from .empty import Empty, quiet
from .kernels import OnCard
from .live import LiveBytes, Moment
from .merged import merged_weights
from .settings import Settings

# Batches that have a next word to be told.
_WRITING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class Trace:
    """What a step held.

    Attributes:
        moments: see ``LiveBytes``.
        forward: how many of them belong to the forward pass.
        assumed: how often the model asked for the places of something, which were taken to be all.
    """

    moments: list[Moment]
    forward: int
    assumed: int = 0


def trace_step(empty: Empty, settings: Settings, *, flash: bool = True) -> Trace:
    """Run a step of ``settings`` on ``empty`` and note what it holds beside parameters and buffers.

    Args:
        settings: with ``chunked_loss`` only where ``can_chunk``.
        flash: whether the card has flash attention.

    Raises:
        ConfigError: the model's forward can't be run without values; names where.
    """
    model, trained = empty.model.model, empty.trained
    batch = _batch(model, settings)
    collected = gc.isenabled()
    gc.disable()  # what a collection frees it would free at another moment each time
    live = LiveBytes((*model.parameters(), *model.buffers(), *batch.values()))
    hooks = [p.register_post_accumulate_grad_hook(lambda p: live.becomes(p.grad, "gradients")) for p in trained]
    try:
        with quiet(), OnCard(flash), live, merged_weights(model, trained, live):
            if settings.accumulation > 1:
                _hold_gradients(trained, live)
            loss = _loss(model, batch, settings, live)
            forward = len(live.moments)
            if live.kind != "loss":  # there it is the gradient of the head's input that ends it
                live.kind = "backward"
            _backward(loss)
    except Exception as error:  # of any kind: it is the model's own code that runs
        raise _not_run(model, error) from error
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in trained:
            parameter.grad = None
        if collected:
            gc.enable()
    return Trace(live.moments, forward, live.assumed)


def _backward(loss: Tensor) -> None:
    """``loss.backward()``, which would leave ``OnCard``, so that activations were recomputed in another way."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def writes(model: nn.Module) -> bool:
    """Whether ``model`` is trained on which word comes next."""
    return task_of(type(model).__name__) in _WRITING and "labels" in inspect.signature(type(model).forward).parameters


def can_chunk(model: nn.Module) -> bool:
    """Whether the loss can be computed a few tokens at a time: ``use_chunked_loss`` tries it."""
    with quiet(), OnCard(), LiveBytes(()):
        try:
            use_chunked_loss(model).remove()
        except UnsupportedModuleError:
            return False
    return True


def _loss(model: Any, batch: dict[str, Tensor], settings: Settings, live: LiveBytes) -> Tensor:
    head = end_tables(model)[1]
    options = {"use_cache": False} if hasattr(model.config, "use_cache") and writes(model) else {}
    hook = None if head is None else head.register_forward_pre_hook(lambda _, args: _is_loss_from(args[0], live))
    try:
        with use_untried(model) if settings.chunked_loss else nullcontext():
            out = model(**batch, **options)
    finally:
        if hook is not None:
            hook.remove()
    loss = getattr(out, "loss", None)
    if loss is not None:
        return loss
    values = out if isinstance(out, Tensor) else next(v for v in out.values() if isinstance(v, Tensor))
    return values.float().square().mean()


def _is_loss_from(hidden: Tensor, live: LiveBytes) -> None:
    """What is made from ``hidden`` on is for the loss, until its gradient is there."""
    live.kind = "loss"
    if hidden.requires_grad:
        hidden.register_hook(lambda _: setattr(live, "kind", "backward"))


def _hold_gradients(trained: list[Tensor], live: LiveBytes) -> None:
    """Those of the batches before, which the step of the optimizer waits for."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
        live.becomes(parameter.grad, "gradients")


def _batch(model: Any, settings: Settings) -> dict[str, Tensor]:
    """What the model's forward takes, without values, of ``settings``' size."""
    rows, config = settings.batch, model.config
    taken = inspect.signature(type(model).forward).parameters
    words = torch.zeros(rows, settings.seq, dtype=torch.long, device="meta")
    batch: dict[str, Tensor] = {}
    if "input_ids" in taken:
        batch["input_ids"] = words
    if writes(model):
        batch["labels"] = words
    elif "pixel_values" in taken:
        batch["pixel_values"] = _empty(model, rows, _of(config, "num_channels", 3), *_image_size(config))
    if "input_ids" not in taken and "input_features" in taken:
        frames = 2 * _of(config, "max_source_positions", settings.seq)
        batch["input_features"] = _empty(model, rows, _of(config, "num_mel_bins", 80), frames)
    if "input_values" in taken:
        bins = _of(config, "num_mel_bins", 0)
        sizes = (_of(config, "max_length", settings.seq), bins) if bins else (settings.seq,)
        batch["input_values"] = _empty(model, rows, *sizes)
    return batch


def _empty(model: Any, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=model.dtype, device="meta")


def _of(config: Any, name: str, default: int) -> int:
    """A number of ``config``, or of the part of it that is about images."""
    found = getattr(config, name, None) or getattr(getattr(config, "vision_config", None), name, None)
    return found if isinstance(found, int) else default


def _image_size(config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None) or getattr(getattr(config, "vision_config", None), "image_size", 224)
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _not_run(model: nn.Module, error: Exception) -> ConfigError:
    said = next(iter(str(error).splitlines()), "") or type(error).__name__
    return ConfigError(
        f"model: expected one whose forward runs on shapes alone, found {type(model).__name__}, which looks at values "
        f"or wants other inputs ({said}); plan a model of its size that transformers has as a causal LM"
    )
