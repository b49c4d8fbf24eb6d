"""Rows of a text that a start hasn't looked at.

A start fits the rows that it looks at, so a model is nearer to the original on them than on others, and learns less
from them. Which rows of a text a start took depends on how many of how many tokens were asked for; so the rows that it
would take are taken again, and others are those that have little in common with them.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from qlora_kit.errors import StorageError

from .batches import amid
from .text import token_rows

# Tokens in a row that two rows have in common if they are of one place, and the share of a row's that may be.
_RUN, _SHARE = 6, 0.1
# Rows to choose from, for each that is wanted.
_MORE = 3


def other_rows(
    source: str | os.PathLike[str], tokenizer: Any, *, rows: int, window: int, looked_at: tuple[int, int]
) -> Tensor:
    """Up to ``rows`` rows of ``window`` token ids, int64 (rows, window), evenly over what ``token_rows`` doesn't take
    of the text ``source``; of a text that has fewer such rows, as many of the others besides.

    Args:
        looked_at: how many rows of how many tokens ``token_rows`` was asked for.

    Raises:
        StorageError: see ``token_rows``.
    """
    all_rows = token_rows(source, tokenizer, rows=_MORE * rows, window=window)
    known: set[tuple[int, ...]] = set()
    with suppress(StorageError):  # too short for a start to have looked at it
        seen = token_rows(source, tokenizer, rows=looked_at[0], window=looked_at[1])
        known.update(run for row in seen.tolist() for run in _runs(row))
    shares = [sum(run in known for run in runs) / max(1, len(runs)) for runs in map(_runs, all_rows.tolist())]
    fresh = [number for number, share in enumerate(shares) if share <= _SHARE]
    rest = [number for number, share in enumerate(shares) if share > _SHARE]
    chosen = amid(fresh, rows) + amid(rest, max(0, rows - len(fresh)))
    return all_rows[torch.tensor(sorted(chosen), dtype=torch.int64)]


def _runs(row: list[int]) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + _RUN]) for start in range(len(row) - _RUN + 1)]
