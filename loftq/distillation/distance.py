"""How far a model is from what it is to foretell: nats of its labels, or squares where it has no logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.errors import ConfigError
from qlora_kit.merging.agreement import output_of, shown_in

from .divergence import Likeliest, divergence
from .soft_labels import SoftLabels


@torch.no_grad()
def distance(model: nn.Module, labels: SoftLabels, rows: Sequence[int]) -> float:
    """Of ``model`` from its labels, a token of ``rows``."""
    sums, counts = zip(*(lost(model, labels, row) for row in rows), strict=True)
    return sum(map(float, sums)) / max(1, sum(counts))


def lost(model: nn.Module, labels: SoftLabels, number: int) -> tuple[Tensor, int]:
    """The sum over the tokens of row ``number`` of what they are away from their labels, and how many there are.

    Raises:
        ConfigError: the labels are of a model with other outputs.
    """
    device = next(p.device for p in model.parameters() if p.device.type != "meta")
    row: Mapping[str, Any] = labels.rows[number]
    row = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in row.items()}
    output, predicts = output_of(model, row)
    told = output[shown_in(row, output).to(output.device)]
    label = labels.labels[number]
    if predicts and isinstance(label, Likeliest) and len(label.ids) == len(told) and labels.words <= told.shape[-1]:
        return divergence(told, label), len(told)
    if predicts or isinstance(label, Likeliest) or label.shape != told.shape:
        raise ConfigError(
            f"labels: expected outputs of the same shape as this model's, found {_said(label, labels.words)} in row "
            f"{number} where it gives {_said(told, told.shape[-1] if predicts else 0)}; take the model that this one "
            "was made from"
        )
    return (told.float() - label.to(told.device)).square().sum() / labels.mean_square, len(told)


def _said(found: Tensor | Likeliest, words: int) -> str:
    """What labels or outputs are of."""
    if isinstance(found, Likeliest):
        return f"{len(found.ids)} tokens of {words:,} words or more"
    return f"{len(found)} tokens of {words:,} words" if words else f"numbers of shape {tuple(found.shape)}"
