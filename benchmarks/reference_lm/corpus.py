"""The text of the reference model: the Python standard library's own sources.

It is on every machine that runs Python, needs no network, and is large enough (about 31 MB) to train a
few million weights until they have the structure of trained ones. Files are split by a hash of their
relative path, so a file keeps its side when the list of files changes between Python releases.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "test"]


def split_of(relative: str) -> Split:
    """Which side of the split a file is on: 1 % test, 1 % calibration, the rest training text."""
    bucket = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") % 100
    return "test" if bucket == 0 else "calibration" if bucket == 1 else "train"


def read(split: Split, root: Path | None = None) -> Iterator[str]:
    """Yield the text of every file of ``split``, in order of path. Files that are not UTF-8 are left out."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages", "__pycache__"} & set(relative.parts):
            continue
        if split_of(relative.as_posix()) == split:
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
