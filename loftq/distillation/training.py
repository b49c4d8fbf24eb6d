"""The adapters of a quantized model learn to be near the original, end to end.

A start looks at one layer at a time, or at what earlier layers got wrong. A few steps on A and B of all layers
together, against what the original foretells of a text, take more of it back, as Lee et al. (2024, "RILQ") do by
squared errors. The quantized weights stay as they are. Text that the start hasn't looked at teaches more.

Gradients are taken a row at a time, and blocks are computed again on the way back, so a step holds the activations of
one block and the inputs of the others. Factors in half precision have float32 copies that steps are taken on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.config.checks import check_int, check_positive
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.merging.agreement import output_of, shown_in
from qlora_kit.model.life import refuse_in_pieces
from qlora_kit.model.lora_model import LoraModel

from ..inputs.gradients import recomputed
from ..inputs.moments import watchable
from .divergence import Likeliest, divergence
from .soft_labels import SoftLabels
from .steps import Steps

# One row in so many is held out, to see what is gained on text that nothing was learned of.
_HELD_OUT = 16


@dataclass(frozen=True)
class Distillation:
    """Of ``distill``.

    Attributes:
        before, after: how far the model is from its labels on rows that nothing was learned of: nats a token, or the
            relative squared error of the output of a model without logits.
        kept: whether the factors are the new ones; they aren't where ``after`` is no less than ``before``.
        steps: that were taken.
        rows: that were learned from.
        seconds: in all.
    """

    before: float
    after: float
    kept: bool
    steps: int
    rows: int
    seconds: float

    def __str__(self) -> str:
        said = f"{self.before:.4g} before and {self.after:.4g} after {self.steps} steps on {self.rows} rows"
        more = "" if self.kept else "; that is no gain, and the adapter is what it was"
        return f"distance from the original on held-out rows: {said} ({self.seconds:.0f} s){more}"


def distill(
    lora: LoraModel,
    labels: SoftLabels,
    *,
    passes: float = 2.0,
    learning_rate: float = 3e-4,
    batch_rows: int = 8,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Distillation:
    """Have the active adapters of ``lora`` learn what the labels say; nothing else changes.

    Args:
        lora: a quantized model with adapters that have a start, as ``apply_lora`` or ``from_pretrained`` gives it.
        labels: what the original foretells, see ``loftq.soft_labels``; one row in sixteen is held out.
        passes: how often the text is gone through.
        learning_rate: of AdamW, the highest; it rises for a tenth of the steps and falls to 0 as a cosine does.
        batch_rows: rows of a step.
        seed: of the rows' order.
        progress: called with the steps that are done and their number.

    Returns:
        What was gained. Where it is nothing on held-out rows, or an error or a Ctrl-C ends it, the factors are those
        that were there before, bit for bit.

    Raises:
        AdapterError: no active adapter, or one in a sharded model.
        ConfigError: an argument that can't work, fewer than two rows, labels of another model, or gradients that
            aren't finite.
    """
    check_positive("passes", passes, "pass passes=2")
    check_positive("learning_rate", learning_rate, "pass learning_rate=3e-4")
    check_int("batch_rows", batch_rows, 1, "pass batch_rows=8")
    refuse_in_pieces(lora, "distill", "distill it in one process before it is sharded")
    count, began = len(labels.rows), time.monotonic()
    if count < 2:
        raise ConfigError(f"labels: expected two rows or more, one to hold out, found {count}; take a longer text")
    factors, few = _factors(lora), max(1, count // _HELD_OUT)
    held = [(2 * k + 1) * count // (2 * few) for k in range(few)]
    learned = [number for number in range(count) if number not in held]
    batches = _batches(learned, min(batch_rows, len(learned)), seed)
    number = max(1, round(passes * len(learned) / batch_rows))
    with watchable(lora), _alone(lora, factors), recomputed(lora, list(lora.adapter_layers())):
        before = _distance(lora, labels, held)
        steps = Steps(factors, learning_rate, number)
        try:
            for step in range(number):
                for row in next(batches):
                    with torch.enable_grad():
                        (_lost(lora, labels, row)[0] * steps.scale).backward()
                steps.take()
                if progress is not None:
                    progress(step + 1, number)
            after = _distance(lora, labels, held)
        except BaseException:
            steps.undo()
            raise
        if not (kept := after < before):
            steps.undo()
    return Distillation(before, after, kept, number, len(learned), time.monotonic() - began)


def _factors(lora: LoraModel) -> list[nn.Parameter]:
    """The active adapters' A and B, each once."""
    if merged := [path for path, layer in lora.adapter_layers().items() if layer.merged_adapters]:
        raise AdapterError(f"{merged[0]}: expected an adapter beside the weight, found it merged; unmerge it first")
    of_active = {
        id(parameter)
        for layer in lora.adapter_layers().values()
        if not layer.disable_adapters
        for name in set(layer.active_adapters) & set(layer.adapter_names())
        for parameter in layer.adapter_tensors(name).values()
    }
    if not (factors := [parameter for parameter in lora.parameters() if id(parameter) in of_active]):
        raise AdapterError("distill: expected an active adapter to learn, found none; add or enable one first")
    return factors


@contextmanager
def _alone(lora: LoraModel, factors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block the factors, and nothing else, get gradients; they lose what they had till then."""
    trained = {parameter: parameter.requires_grad for parameter in lora.parameters()}
    own = set(factors)
    try:
        for parameter in trained:
            parameter.requires_grad_(parameter in own)
        for parameter in own:
            parameter.grad = None
        yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)


def _batches(rows: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Of ``size`` rows each, all in a new order every time that they are through."""
    order, left = random.Random(seed), list[int]()
    while True:
        while len(left) < size:
            left += order.sample(rows, len(rows))
        yield left[:size]
        del left[:size]


@torch.no_grad()
def _distance(lora: LoraModel, labels: SoftLabels, rows: Sequence[int]) -> float:
    """Of ``lora`` from its labels, a token of ``rows``."""
    lost, counts = zip(*(_lost(lora, labels, row) for row in rows), strict=True)
    return sum(map(float, lost)) / max(1, sum(counts))


def _lost(lora: LoraModel, labels: SoftLabels, number: int) -> tuple[Tensor, int]:
    """The sum over a row's tokens of what they are away from their labels, and how many there are."""
    device = next(p.device for p in lora.parameters() if p.device.type != "meta")
    row: Mapping[str, Any] = labels.rows[number]
    row = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in row.items()}
    output, predicts = output_of(lora, row)
    told, label = output[shown_in(row, output)], labels.labels[number]
    known = label.ids if isinstance(label, Likeliest) else label
    fits = len(known) == len(told) and predicts == isinstance(label, Likeliest)
    fits = fits and (int(known.max()) < told.shape[-1] if predicts else known.shape == told.shape)
    if not fits:
        raise ConfigError(
            f"labels: expected those of a model with outputs of the same shape, found {tuple(known.shape)} of row "
            f"{number} where this model gives {tuple(told.shape)}; take them of the model that this one was made from"
        )
    if isinstance(label, Likeliest):
        return divergence(told, label), len(told)
    label = label.to(told.device)
    return (told.float() - label).square().sum() * (len(told) / label.square().sum()), len(told)
