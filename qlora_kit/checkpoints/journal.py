"""The record of a run that can be cut off at any point: what it was asked for, and every unit that is finished.

``journal.jsonl`` in a hidden folder of the output. The first line holds the options and what identifies the
source; each further line belongs to one unit, written after the unit's bytes are on the disk. So after a kill
the bytes that the journal knows of are whole, and what lies behind them in the files is cut away.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError
from .files import json_object, naming, unwritable
from .records import check_line

_VERSION = 1


class Journal:
    """Opens the journal in ``out``, or begins one.

    Args:
        out: the output folder.
        task: options and source, JSON values; a journal begun for another task is refused.
        work_folder: the hidden folder's name.
        earlier: defaults of options in earlier releases, where they are None now: their runs are gone on with.
        beside: a pattern of files in that folder that hold finished work too, which isn't noted here yet.

    Attributes:
        done: the lines of finished units, in their order.
        measured: what was noted by ``note``, by path.

    Raises:
        StorageError: another task's output is in ``out`` (with what differs), another process is writing
            there, or files that are no output of ours.
    """

    def __init__(
        self,
        out: Path,
        task: Mapping[str, Mapping[str, Any]],
        work_folder: str,
        *,
        earlier: Mapping[str, Any] | None = None,
        beside: str | None = None,
    ) -> None:
        self._beside = beside
        self.folder = out / work_folder
        self.path = self.folder / "journal.jsonl"
        head = json.loads(json.dumps({"version": _VERSION, **task}))
        try:
            if not self.path.exists() and out.is_dir() and any(e.name != work_folder for e in out.iterdir()):
                raise StorageError(
                    f"{out}: expected a new or empty folder, or one in which this command was interrupted, found "
                    f"{sorted(e.name for e in out.iterdir())[:5]}; choose another folder or remove this one"
                )
            self._out = None if out.exists() else out
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder / "lock", out)
        except OSError as error:
            raise unwritable(out, error) from error
        try:
            lines, whole = self._read()
            if len(lines) == 1 and lines[0] != head and not self._has_more():
                lines, whole = [], 0  # nothing was finished for that other task
            if lines:
                _check_same(lines[0], head, out, earlier or {})
            for line in lines[1:]:
                check_line(line)
        except (OSError, ValueError) as error:  # an error of ours is a ValueError too
            self._lock.close()
            raise error if isinstance(error, StorageError) else self.damaged(error) from error
        # What a killed run kept there of activations, which can be large.
        for left in (entry for entry in self.folder.iterdir() if entry.is_dir()):
            shutil.rmtree(left)
        self.measured = {line["path"]: line["measured"] for line in lines[1:] if "measured" in line}
        self.done: list[dict[str, Any]] = [line for line in lines[1:] if "measured" not in line]
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115 - closed by close
        self._file.truncate(whole)
        self._file.seek(whole)
        if not lines:
            self.add(head, done=False)

    def note(self, path: str, measured: list[dict[str, Any]]) -> None:
        """Note what a module's choices would cost and leave."""
        self.add({"path": path, "measured": measured}, done=False)
        self.measured[path] = measured

    def add(self, line: Mapping[str, Any], *, done: bool = True) -> None:
        """Note a finished unit; it is on the disk when this returns."""
        with naming(self.path):
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if done:
            self.done.append(dict(line))

    def finished(self, units: Iterable[str]) -> set[str]:
        """Which of ``units`` are finished.

        Raises:
            StorageError: others are, or one twice.
        """
        names = [line["unit"] for line in self.done]
        known = set(units)
        if odd := [name for name in names if name not in known]:
            raise self.damaged(f"{odd[0]!r} is no tensor of this run")
        if len(set(names)) != len(names):
            raise self.damaged("a tensor stands twice")
        return set(names)

    def close(self) -> None:
        """Let others go on from here; a run that has finished nothing leaves nothing."""
        self._file.close()
        self._lock.close()
        if not self.done and not self.measured and not self._has_more():
            shutil.rmtree(self.folder, ignore_errors=True)
            if self._out is not None and self._out.is_dir() and not any(self._out.iterdir()):
                self._out.rmdir()

    def _has_more(self) -> bool:
        """Whether finished work lies beside the journal."""
        return self._beside is not None and any(self.folder.glob(self._beside))

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The whole lines, and where they end: a last line without its newline was being written at the kill."""
        data = self.path.read_bytes() if self.path.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        try:
            return [json_object(line) for line in whole.splitlines()], len(whole)
        except ValueError as error:
            raise self.damaged(error) from error

    def damaged(self, error: object) -> StorageError:
        """What to say of a journal of which ``error`` was found."""
        return StorageError(
            f"{self.path}: expected a journal of JSON lines, found a damaged one ({error}); remove the output "
            "folder and begin again"
        )


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with those of a group of them, a budget's say, beside the others, and its bits as all layers'."""
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat.update({key: value} if key != "budget" else value if isinstance(value, dict) else {})
    if (bits := flat.pop("bits", None)) is not None:
        flat["loftq_bits"] = bits
    return {key: None if value == [] else value for key, value in flat.items()}


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path, earlier: Mapping[str, Any]) -> None:
    differences = []
    for part in sorted({*before, *now}):
        old, new = before.get(part), now.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            old, new = (_flat(old), _flat(new)) if part == "options" else (old, new)
            changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
            if part == "options":  # by the names of arguments, which a command has its own words for
                changed = [key for key in changed if new.get(key) is not None or old.get(key) != earlier.get(key)]
                differences += [f"{key}={old.get(key)!r} then, {key}={new.get(key)!r} now" for key in changed]
            else:
                differences += [f"{part} {key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed]
        elif old != new:
            differences.append(f"{part}: {old!r} then, {new!r} now")
    if differences:
        raise StorageError(
            f"{out}: expected the command that was begun here, found another ({', '.join(differences)}); give the "
            f"same options and source to go on, remove {out} to begin anew, or choose another folder"
        )


def _locked(path: Path, out: Path) -> Any:
    """An open file that only one process at a time has; freed by the system when the process ends."""
    file = path.open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # no such locks on Windows
        pass
    except OSError as error:
        file.close()
        raise StorageError(
            f"{out}: expected no other process writing there, found one; wait for it, or choose another folder"
        ) from error
    return file
