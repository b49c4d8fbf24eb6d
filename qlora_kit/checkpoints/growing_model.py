"""A model's shards while they grow, and how they come to their places: a run that is cut off loses nothing finished.

Shards are written as numbered parts in a hidden work folder. What has been appended is told as plain data for a
journal (``journal``), and given those lines again the parts are cut back to it and go on, to the bytes that
an uninterrupted run writes. Only when all is there do the parts get their names, by links, and the index after them;
the parts stay until the whole output stands, so that a run that is cut off in between finds them again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import StorageError
from .checksums import check_tensors, checksums_in
from .files import check_writable, publish, write_text_atomically
from .growing_file import GrowingFile, header_room
from .shards import INDEX_SUFFIX, ShardReader


class GrowingModel:
    """Appends tensors to one part after the other.

    Args:
        work: the folder of the parts.
        names: of all tensors that the output may hold.
        shard_bytes: a part is closed once it holds this much.
        lines: what ``append`` told of earlier, in any order.
    """

    def __init__(self, work: Path, names: Iterable[str], shard_bytes: int, lines: Iterable[Mapping[str, Any]]) -> None:
        self.work, self.shard_bytes = work, shard_bytes
        self.room = header_room(names)
        self.placed: dict[int, dict[str, Any]] = {0: {}}
        for line in lines:
            self.placed.setdefault(line["shard"], {}).update(line["base"])
        if sorted(self.placed) != list(range(len(self.placed))):
            raise StorageError(
                f"{work}: expected parts numbered one after the other, found {sorted(self.placed)[:8]} in the journal; "
                "remove the output folder and begin again"
            )
        self.current = max(self.placed)
        self.shard = GrowingFile(self.part(self.current), self.room, self.placed[self.current])

    def append(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write ``tensors``; in which part and where they are, once they are on the disk."""
        if self.shard.entries and self.shard.size >= self.shard_bytes:
            self.shard.finish()
            self.current += 1
            self.placed[self.current] = {}
            self.shard = GrowingFile(self.part(self.current), self.room)
        base = {name: self.shard.append(name, tensor) for name, tensor in tensors.items()}
        self.placed[self.current].update(base)
        self.shard.sync()
        return {"shard": self.current, "base": base}

    def place(self, out: Path) -> None:
        """End the last part and give all of them their names in ``out``; the index isn't written yet."""
        self.shard.finish()
        for number, name in _names(self.placed).items():
            place(self.part(number), out / name)

    def write_index(self, out: Path) -> None:
        """Write the index of several shards; a single one needs none."""
        names = _names(self.placed)
        if len(names) == 1:
            return
        weight_map = {name: names[number] for number, held in self.placed.items() for name in held}
        total = sum(e["data_offsets"][1] - e["data_offsets"][0] for held in self.placed.values() for e in held.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text_atomically(out / f"model{INDEX_SUFFIX}", json.dumps(index, indent=2) + "\n")

    def checksums(self) -> dict[str, str]:
        """Of all tensors that were written, by name; see ``checksums``."""
        return {name: value for held in self.placed.values() for name, value in checksums_in(held).items()}

    def close(self) -> None:
        """Leave the parts as they are, to be gone on with."""
        self.shard.close()

    def part(self, number: int) -> Path:
        return self.work / f"part-{number:05d}.safetensors"


def _names(placed: Mapping[int, Any]) -> dict[int, str]:
    """The files' names, by the parts' numbers."""
    count = len(placed)
    if count == 1:
        return {0: "model.safetensors"}
    return {number: f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in sorted(placed)}


def check_placed(out: Path, lines: Iterable[Mapping[str, Any]], *, fix: str) -> None:
    """Refuse a finished output that is no longer what was written: every shard, the index, and every byte.

    Args:
        lines: what ``append`` told of all of it. fix: ends the message.

    Raises:
        StorageError: names what differs.
    """
    placed: dict[int, dict[str, Any]] = {}
    for line in lines:
        placed.setdefault(line["shard"], {}).update(line["base"])
    names = _names(placed)
    gone = [name for name in names.values() if not (out / name).is_file()]
    index = [f"model{INDEX_SUFFIX}"] if len(names) > 1 and not (out / f"model{INDEX_SUFFIX}").is_file() else []
    if gone or index:
        raise StorageError(f"{out}: expected the files that were written, found none of {[*gone, *index]}; {fix}")
    entries = {name: entry for held in placed.values() for name, entry in held.items()}
    reader = ShardReader(out)
    known = checksums_in(entries)
    if len(known) == len(entries):
        check_tensors(reader, known, fix=fix)
    elif set(reader) != set(entries):  # noted by an earlier release, which took no checksums
        odd = sorted(set(reader) ^ set(entries))
        raise StorageError(
            f"{out}: expected the {len(entries)} tensors that were written, found others: {odd[:4]}; {fix}"
        )


def place(part: Path, target: Path) -> None:
    """Give ``target`` the bytes of ``part``: by a link to the same file, or a copy where there are no links."""
    staged = part.with_name(part.name + ".placed")
    staged.unlink(missing_ok=True)
    try:
        os.link(part, staged)
    except OSError:
        shutil.copyfile(part, staged)
    publish(staged, target)


def clear(work: Path) -> None:
    """Take away the parts that a finished run has put in their places."""
    for part in work.glob("*.safetensors*"):
        part.unlink()


def check_disk(out: Path, needed: int) -> None:
    """Refuse to begin what the disk can't hold: ``needed`` bytes, less what an earlier run left in ``out``.

    Raises:
        StorageError: with both numbers.
    """
    check_writable(out)
    folder = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    there = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.exists() else 0
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise StorageError(
            f"{out}: expected {(needed - there) / 1e9:,.2f} GB of free disk for the output, found "
            f"{free / 1e9:,.2f} GB; free some, or choose a folder on another disk"
        )
