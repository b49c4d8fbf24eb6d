"""The peak of a training run, part by part."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from .depth import extended, peak_of, stack_of
from .empty import Empty, make_empty
from .optimizers import is_paged, state_bytes
from .settings import Settings
from .step import can_chunk, trace_step
from .world import on_each

_PARTS = {
    "activations": "activations, kept for the backward",
    "merged": "weights as they will be merged",
    "loss": "logits and loss",
    "gradients": "gradients",
    "backward": "work of the backward",
}


@dataclass(frozen=True)
class Estimate:
    """What a run holds at its peak, on each of its GPUs.

    Attributes:
        parts: bytes by what they are for; those of weights are there all the time.
        moment: "forward", "backward" or "optimizer step".
        preparing: the peak while the model is prepared.
        paged: bytes of optimizer states in memory that makes way; not among ``parts``.
        trained: numbers that are trained.
        assumed: how often the model asked for the places of something, which were taken to be all.
    """

    parts: dict[str, int]
    moment: str
    preparing: int
    paged: int
    trained: int
    assumed: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class Estimator:
    """Estimates of one model's training; what was found once is kept.

    Args:
        model: a folder, or a name on the Hub.
        flash: whether the card has flash attention.
    """

    def __init__(self, model: str | os.PathLike[str], *, flash: bool = True) -> None:
        self.model, self.flash = model, flash
        self._empty: dict[Settings, Empty] = {}
        self._found: dict[Settings, Estimate] = {}
        self._chunks: dict[Settings, bool] = {}

    def empty(self, settings: Settings) -> Empty:
        """The model without values as these settings train it."""
        key = _of_model(settings)
        if key not in self._empty:
            self._empty[key] = make_empty(self.model, settings)
        return self._empty[key]

    def __call__(self, settings: Settings) -> Estimate:
        """The peak of a run.

        Raises:
            ConfigError, StorageError, TargetError: see ``make_empty`` and ``trace_step``.
        """
        if settings not in self._found:
            self._found[settings] = self._estimate(settings)
        return self._found[settings]

    def longest(self, settings: Settings) -> int | None:
        """The most tokens that the model has places for; None where it doesn't say."""
        found = getattr(self.empty(settings).model.model.config, "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    def can_chunk(self, settings: Settings) -> bool:
        """Whether the loss can be computed a few tokens at a time."""
        key = _of_model(settings)
        if key not in self._chunks:
            model: Any = self.empty(settings).model.model
            stack = stack_of(model)
            with stack.cut(0) if stack else nullcontext():
                self._chunks[key] = can_chunk(model)
        return self._chunks[key]

    def _estimate(self, settings: Settings) -> Estimate:
        empty = self.empty(settings)
        if settings.world_size > 1:
            alone = self(settings.but(world_size=1, engine="ddp"))
            return replace(alone, parts=on_each(alone.parts, empty, settings))
        held, moment, assumed = self._held(empty, settings)
        states = state_bytes(settings.optimizer, empty.trained)
        paged = states if is_paged(settings.optimizer) else 0
        gradients = sum(parameter.nbytes for parameter in empty.trained)
        parts = {**empty.bytes, "optimizer states": states - paged}
        # torch's AdamW computes with a copy of the parameters' size, bitsandbytes' in place.
        in_step = {"gradients": gradients, "work of the optimizer": gradients if settings.optimizer == "adamw" else 0}
        in_step[_PARTS["merged"]] = held["merged"]  # kept from step to step
        if sum(in_step.values()) > sum(held.values()):
            held, moment = in_step, "optimizer step"
        else:
            held = {_PARTS[kind]: count for kind, count in held.items()}
        parts = {name: count for name, count in {**parts, **held}.items() if count}
        trained = sum(parameter.numel() for parameter in empty.trained)
        return Estimate(parts, moment, empty.preparing, paged, trained, assumed)

    def _held(self, empty: Empty, settings: Settings) -> tuple[dict[str, int], str, int]:
        """What a step holds beside weights at its peak, in which pass, and what was assumed for it."""
        model: Any = empty.model.model
        if settings.chunked_loss and not self.can_chunk(settings):
            settings = settings.but(chunked_loss=False)
        stack = stack_of(model)
        if stack is not None:
            with stack.cut(0):
                short = trace_step(empty, settings, flash=self.flash)
            with stack.cut(1):
                longer = trace_step(empty, settings, flash=self.flash)
            found = extended(short, longer, stack.left)
            if found is not None:
                return *found, short.assumed
        whole = trace_step(empty, settings, flash=self.flash)
        return *peak_of(whole), whole.assumed


def _of_model(settings: Settings) -> Settings:
    """Of ``settings`` what the model is made by."""
    return settings.but(seq=1, batch=1, accumulation=1, optimizer="sgd", chunked_loss=False, world_size=1, engine="ddp")
