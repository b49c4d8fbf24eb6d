"""The adapters of a quantized model learn to be near the original, end to end.

A start looks at one layer at a time, or at what earlier layers got wrong. A few steps on A and B of all layers
together, against what the original foretells of a text, take more of it back, as Lee et al. (2024, "RILQ") do by
squared errors. The quantized weights stay as they are. Text that the start hasn't looked at teaches more.

Gradients are taken a row at a time, and blocks are computed again on the way back, so a step holds the activations of
one block and the inputs of the others. Factors in half precision have float32 copies that steps are taken on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from qlora_kit.config.checks import check_int, check_positive
from qlora_kit.errors import AdapterError, ConfigError
from qlora_kit.injection.adapted import adapted_of
from qlora_kit.model.life import refuse_in_pieces
from qlora_kit.model.lora_model import LoraModel

from ..inputs.batches import amid
from ..inputs.gradients import alone, recomputed
from ..inputs.moments import watchable
from .distance import distance, lost
from .soft_labels import SoftLabels
from .steps import Steps
from .surroundings import undisturbed

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
        more = "" if self.kept else "; that is no gain, and the adapter is what it was"
        return f"{self.gain} ({self.seconds:.0f} s){more}"

    @property
    def gain(self) -> str:
        """In words."""
        said = f"{self.before:.4g} before and {self.after:.4g} after {self.steps} steps on {self.rows} rows"
        return f"distance from the original on held-out rows: {said}"


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
        lora: a quantized model with adapters that have a start, as ``apply_lora`` or ``from_pretrained`` gives it, or
            a ``PeftModel`` of ``qlora_kit.compat.peft``. Compiled or not, it runs uncompiled meanwhile.
        labels: what the original foretells, see ``loftq.soft_labels``; one row in sixteen is held out.
        passes: how often the text is gone through.
        learning_rate: of AdamW, the highest; it rises for a tenth of the steps and falls to 0 as a cosine does.
        batch_rows: rows of a step; all, where there are fewer.
        seed: of the rows' order.
        progress: called with the steps that are done and their number.

    Returns:
        What was gained. Where it is nothing on held-out rows, or an error or a Ctrl-C ends it, the factors are those
        that were there before, bit for bit.

    Raises:
        AdapterError: no model with adapters, no active one, or one that is merged, sharded or not loaded.
        ConfigError: an argument that can't work, fewer than two rows, labels of another model, or outputs or gradients
            that aren't finite.
    """
    check_positive("passes", passes, "pass passes=2")
    check_positive("learning_rate", learning_rate, "pass learning_rate=3e-4")
    check_int("batch_rows", batch_rows, 1, "pass batch_rows=8")
    check_int("seed", seed, 0, "pass seed=0")
    refuse_in_pieces(adapted_of(lora).root, "distill", "distill it in one process before it is sharded")
    began, (learned, held), factors = time.monotonic(), _parted(labels), _factors(lora)
    size = min(batch_rows, len(learned))
    batches, number = _batches(learned, size, seed), max(1, round(passes * len(learned) / size))
    with undisturbed(), watchable(lora), alone(lora, factors), recomputed(lora, list(lora.adapter_layers())):
        before = distance(lora, labels, held)
        if not math.isfinite(before):
            raise ConfigError(
                f"distill: expected finite outputs of {type(lora).__name__}, found NaN or infinity on held-out rows; "
                "load the model in bfloat16 or float32, and check that its weights are whole"
            )
        steps, kept = Steps(factors, learning_rate, number), False
        try:
            for step in range(number):
                for row in next(batches):
                    with torch.enable_grad():
                        (lost(lora, labels, row)[0] * steps.scale).backward()
                steps.take()
                if progress is not None:
                    progress(step + 1, number)
            after = distance(lora, labels, held)
            kept = after < before
        finally:
            if not kept:
                steps.undo()
    return Distillation(before, after, kept, number, len(learned), time.monotonic() - began)


def _parted(labels: SoftLabels) -> tuple[list[int], list[int]]:
    """The numbers of the rows to learn from, and of those that are held out, evenly over the text."""
    if not isinstance(labels, SoftLabels):
        raise ConfigError(
            f"labels: expected what soft_labels returns, found {type(labels).__name__}; pass labels="
            "loftq.soft_labels(original, text)"
        )
    if (count := len(labels.rows)) < 2:
        raise ConfigError(f"labels: expected two rows or more, one to hold out, found {count}; take a longer text")
    held = amid(range(count), max(1, count // _HELD_OUT))
    return [number for number in range(count) if number not in held], held


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
    if any(factor.is_meta for factor in factors):
        raise AdapterError("distill: expected factors with values, found some on the meta device; load them first")
    if any(parameter.is_inference() for parameter in lora.parameters()):
        raise AdapterError(
            "distill: expected parameters that gradients can be taken of, found some that were made inside "
            "torch.inference_mode; load the model and its adapter outside"
        )
    return factors


def _batches(rows: Sequence[int], size: int, seed: int) -> Iterator[list[int]]:
    """Of ``size`` rows each, all in a new order every time that they are through."""
    order, left = random.Random(seed), list[int]()
    while True:
        while len(left) < size:
            left += order.sample(rows, len(rows))
        yield left[:size]
        del left[:size]
