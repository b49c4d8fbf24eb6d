"""Files that are whole or absent: a write goes to a temporary name beside its target and is renamed over it.

A rename inside one folder is atomic on every file system that matters, so a reader sees the old bytes or the
new ones, never half of them, and a killed writer leaves at most a stray ``.<name>.<random>.tmp``.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Give ``path`` the bytes that ``write`` puts into the open file it is called with, all or nothing.

    The bytes are flushed to the disk before the rename: a machine that stops never shows an empty new file.
    The parent folder is made if it isn't there. On any error ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def write_text_atomically(path: Path, text: str) -> None:
    """Give ``path`` the UTF-8 bytes of ``text``, all or nothing."""
    write_atomically(path, lambda file: file.write(text.encode()))


def _umask() -> int:
    """The permissions that new files don't get; a temporary file is private, a finished one shouldn't be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
