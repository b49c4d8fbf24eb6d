"""Parts of a text that comes in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Batch = Mapping[str, Any]


def in_parts(batch: Batch, size: int) -> list[dict[str, Any]]:
    """``batch`` in parts of ``size`` rows; the whole where it isn't rows."""
    count = rows_in(batch)
    return [
        {key: value[k : k + size] if isinstance(value, Tensor) else value for key, value in batch.items()}
        for k in range(0, count, size)
    ] or [dict(batch)]


def rows_in(batch: Batch) -> int:
    """How many rows ``batch`` has; 0 where it isn't rows."""
    counts = {value.shape[0] if value.dim() else 0 for value in _tensors(batch)}
    return counts.pop() if len(counts) == 1 else 0


def evenly(batches: Sequence[Batch], tokens: int) -> list[Batch]:
    """Batches that lie evenly among these, of about so many tokens together if the others are like the first; at least
    one."""
    shapes = [value.shape[:-1] if value.is_floating_point() else value.shape for value in _tensors(batches[0])]
    size = max([1, *(shape.numel() for shape in shapes)])
    wanted = max(1, min(len(batches), tokens // size))
    return [batches[number * len(batches) // wanted] for number in range(wanted)]


def amid(numbers: Sequence[int], count: int) -> list[int]:
    """``count`` of ``numbers``, each from the middle of one of as many equal parts; all, where there are no more."""
    count = min(count, len(numbers))
    return [numbers[(2 * k + 1) * len(numbers) // (2 * count)] for k in range(count)]


def _tensors(batch: Batch) -> list[Tensor]:
    return [value for value in batch.values() if isinstance(value, Tensor)]
