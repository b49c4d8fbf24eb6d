"""Parts of a text that comes in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any]


def single_rows(batch: Batch) -> list[Batch]:
    """The rows of ``batch``, each a batch; ``batch`` itself where that isn't rows."""
    counts = {value.shape[0] if value.dim() else 0 for value in _tensors(batch)}
    if len(counts) != 1 or not (count := counts.pop()):
        return [batch]
    return [
        {key: value[k : k + 1] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for k in range(count)
    ]


def evenly(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Batches that lie evenly among these, of about so many tokens together if the others are like the first; at least
    one."""
    shapes = [value.shape[:-1] if value.is_floating_point() else value.shape for value in _tensors(batches[0])]
    size = max([1, *(shape.numel() for shape in shapes)])
    wanted = max(1, min(len(batches), tokens // size))
    return [batches[number * len(batches) // wanted] for number in range(wanted)]


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]
