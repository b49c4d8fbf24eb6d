"""Text to fine-tune on: Python sources of the installed torch, split by file.

The reference model was trained on the standard library's sources, so this text is the same language in another
dialect, present wherever this package runs, and read without a network. A file is held out, or not, by a hash
of its path; windows are cut per side, so no window straddles the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loftq.inputs.text import in_rows, token_ids

from ..errors import ConfigError

FOLDERS = ("distributions", "nn", "optim")
HELD_OUT_OF_100 = 12


@dataclass(frozen=True)
class Windows:
    """Token ids cut into rows of equal length: (rows, window) int64 each."""

    train: Tensor
    held_out: Tensor
    source: str


def is_held_out(relative: str) -> bool:
    """Whether the file at this path (below torch's folder, with forward slashes) is for measuring only."""
    bucket = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") % 100
    return bucket < HELD_OUT_OF_100


def read_sources(held_out: bool) -> Iterator[str]:
    """The text of every source file of one side, in order of path."""
    root = Path(torch.__file__).parent
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            if is_held_out(path.relative_to(root).as_posix()) == held_out:
                yield path.read_text(encoding="utf-8")


def make_windows(tokenizer: Any, *, window: int, train_rows: int, held_out_rows: int, seed: int) -> Windows:
    """Up to ``train_rows`` and ``held_out_rows`` windows of ``window`` tokens, drawn without replacement.

    Raises:
        ConfigError: the text gives fewer training rows than asked for.
    """
    train, held_out = (in_rows(token_ids(read_sources(side), tokenizer), window) for side in (False, True))
    if len(train) < train_rows:
        raise ConfigError(
            f"steps x batch: expected at most {len(train)} rows of {window} tokens, which is what the sources of "
            f"torch {torch.__version__} give, found {train_rows}; ask for fewer steps"
        )
    generator = torch.Generator().manual_seed(seed)
    return Windows(
        train=train[torch.randperm(len(train), generator=generator)[:train_rows]],
        held_out=held_out[torch.randperm(len(held_out), generator=generator)[:held_out_rows]],
        source=f"sources of torch {torch.__version__} ({', '.join(FOLDERS)})",
    )
