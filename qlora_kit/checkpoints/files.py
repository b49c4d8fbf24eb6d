"""Files that are whole or absent: a write goes to a temporary name beside its target and is renamed over it.

A rename inside one folder is atomic on every file system that matters, so a reader sees the old bytes or the
new ones, never half of them, and a killed writer leaves at most a stray ``.<name>.<random>.tmp``.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def stage(path: Path, data: bytes) -> Path:
    """A finished temporary file beside ``path`` that holds ``data``, on the disk and ready to be renamed.

    The parent folder is made if it isn't there. On any error no file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def publish(staged: Path, path: Path) -> None:
    """Rename ``staged`` over ``path``, and make the rename last before anything after it."""
    os.replace(staged, path)
    sync_folder(path.parent)


def withdraw(staged: Path) -> None:
    """Remove a staged file, if it wasn't published."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(staged)


def write_atomically(path: Path, data: bytes) -> None:
    """Give ``path`` the bytes ``data``, all or nothing."""
    staged = stage(path, data)
    try:
        publish(staged, path)
    finally:
        withdraw(staged)


def write_text_atomically(path: Path, text: str) -> None:
    """Give ``path`` the UTF-8 bytes of ``text``, all or nothing."""
    write_atomically(path, text.encode())


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to the disk, so that changes of names keep their order when a machine stops."""
    if os.name == "posix":  # elsewhere a folder can't be opened, and renames are written through
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    """The permissions that new files don't get; a temporary file is private, a finished one shouldn't be."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
