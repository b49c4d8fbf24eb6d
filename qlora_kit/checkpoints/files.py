"""Files that are whole or absent: a write goes to a temporary name beside its target and is renamed over it.

A rename inside one folder is atomic on every file system that matters, so a reader sees the old bytes or the
new ones, never half of them, and a killed writer leaves at most a stray ``.<name>.<random>.tmp``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import StorageError

# How a file begins that a clone without Git LFS has in the place of a large one.
_POINTER = b"version https://git-lfs"


def json_object(data: bytes | str) -> dict[str, Any]:
    """The object that ``data``, JSON of unknown origin, is.

    Raises:
        ValueError: it isn't JSON, nests deeper than a reader can follow, holds half a character (a lone surrogate,
            which can be neither written nor shown), or isn't an object.
    """
    try:
        found = json.loads(data)
        if "\\ud" in (data if isinstance(data, str) else data.decode("latin-1")).lower():
            json.dumps(found, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("lists or objects nested thousands deep") from error
    if not isinstance(found, dict):
        raise ValueError(f"a {type(found).__name__} where an object was expected")
    return found


def check_new_folder(out: Path) -> None:
    """Refuse to write into a folder in which something is: what is there would be mixed up with what is written.

    Raises:
        StorageError: ``out`` is a file, a folder that isn't empty, or lies where no folder can be made.
    """
    try:
        if out.is_dir():
            if found := sorted(entry.name for entry in out.iterdir()):
                raise StorageError(
                    f"{out}: expected a new or empty folder, found {found[:5]}; choose another folder or remove this "
                    "one"
                )
        elif out.exists() or out.is_symlink():
            raise StorageError(f"{out}: expected a new or empty folder, found a file; choose another path")
    except OSError as error:
        raise unwritable(out, error) from error
    check_writable(out)


def check_writable(out: Path) -> None:
    """Refuse a folder that can't be made, or be written to: by making it, since rights alone don't tell.

    Raises:
        StorageError: says why.
    """
    try:
        made = [folder for folder in (out, *out.absolute().parents) if not folder.exists()]
        try:
            out.mkdir(parents=True, exist_ok=True)
            if not os.access(out, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        raise unwritable(out, error) from error


def unwritable(out: Path, error: OSError) -> StorageError:
    """What to say of a folder that can't be written to."""
    return StorageError(
        f"{out}: expected a folder that can be written to, found {error.strerror or error}; choose another"
    )


def not_whole(file: Path, error: Exception, again: str) -> StorageError:
    """What to say of a file that should be safetensors and isn't, or can't be read.

    Args:
        error: of reading it.
        again: how it is had anew.
    """
    found, fix = f"a truncated or foreign one ({error})", again
    try:
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                found, fix = "the pointer that Git LFS puts in its place", "run git lfs pull in its folder"
    except PermissionError as denied:  # which safetensors calls a file that isn't there
        found, fix = f"one that can't be read ({denied.strerror})", "see to the rights of the file"
    except OSError:
        pass
    return StorageError(f"{file}: expected a whole safetensors file, found {found}; {fix}")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of writing that name no file, since a write knows only its descriptor, name ``path``."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def stage(path: Path, data: bytes) -> Path:
    """A finished temporary file beside ``path`` that holds ``data``, on the disk and ready to be renamed.

    The parent folder is made if it isn't there. On any error no file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
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
