"""A safetensors file written a tensor at a time, whose contents needn't be known beforehand.

The format puts the header, with every tensor's place, before the data. So room is reserved for it, the data is
appended, and the header is written last, filled up with the spaces that the format allows. Until then the file
has no valid header and no reader takes it for whole.

A writer can be opened again on a file that was cut off: given what had been appended up to some point, it cuts
the rest away and goes on, and ends with the bytes it would have ended with.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import StorageError
from .checksums import KEY, checksum
from .files import naming
from .shards import FORMAT_NAMES

# A header entry beside its name: dtype, shape of a few dimensions, two offsets.
_ENTRY_BYTES = 160


def header_room(names: Iterable[str], metadata_bytes: int = 256) -> int:
    """Bytes to reserve for the header of a file that may hold any of the tensors ``names``."""
    size = metadata_bytes + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
    return -(-size // 8) * 8


def read_appended(path: Path, room: int, entry: Mapping[str, Any]) -> Tensor:
    """A tensor of a file that a writer with this ``room`` has begun, whether it is finished or not."""
    start, stop = entry["data_offsets"]
    with path.open("rb") as file:
        file.seek(8 + room + start)
        data = bytearray(file.read(stop - start))
    dtype = next(dtype for dtype, name in FORMAT_NAMES.items() if name == entry["dtype"])
    return (
        torch.frombuffer(data, dtype=dtype).view(entry["shape"]) if data else torch.empty(entry["shape"], dtype=dtype)
    )


class GrowingFile:
    """Appends tensors to ``path``, which becomes a safetensors file with ``finish``.

    Args:
        path: is made, or cut back to ``written``.
        room: bytes reserved for the header, see ``header_room``.
        written: header entries of the tensors that the file holds already, as ``append`` returned them.
    """

    def __init__(self, path: Path, room: int, written: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.path, self.room = path, room
        self.entries: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in (written or {}).items()}
        self.size = max((entry["data_offsets"][1] for entry in self.entries.values()), default=0)
        begin = 8 + room
        self._check_places()
        if self.entries and (not path.exists() or path.stat().st_size < begin + self.size):
            raise StorageError(
                f"{path}: expected at least {begin + self.size:,} bytes of a file begun earlier, found "
                f"{path.stat().st_size if path.exists() else 0:,}; remove the output folder and begin again"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "r+b" if path.exists() else "w+b")  # noqa: SIM115 - closed by finish or close
        self._file.truncate(begin + self.size)
        self._file.seek(begin + self.size)

    def _check_places(self) -> None:
        """What is said to have been appended lies in a row: else a reader would take it for damaged."""
        places = sorted(entry["data_offsets"] for entry in self.entries.values())
        ends = [0, *(place[1] for place in places)]
        if [place[0] for place in places] != ends[:-1]:
            raise StorageError(
                f"{self.path}: expected tensors one after the other, found gaps in what was noted of it; remove the "
                "output folder and begin again"
            )

    def append(self, name: str, tensor: Tensor) -> dict[str, Any]:
        """Write one tensor after the others; its header entry, with a checksum of its bytes.

        Raises:
            StorageError: the name is there already, or safetensors has no such dtype.
        """
        if name in self.entries or tensor.dtype not in FORMAT_NAMES:
            what = "a name once" if name in self.entries else f"one of {sorted(map(str, FORMAT_NAMES))}"
            raise StorageError(f"{self.path}: {name}: expected {what}, found another tensor of {tensor.dtype}")
        data = tensor.detach().to("cpu").contiguous()
        start, count = self.size, data.numel() * data.element_size()
        if count:
            with naming(self.path):
                self._file.write(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        self.size = start + count
        place = {"dtype": FORMAT_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, self.size]}
        entry = {**place, KEY: checksum(data)}
        self.entries[name] = entry
        return entry

    def sync(self) -> None:
        """Have all that was appended on the disk before returning."""
        with naming(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def finish(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and close; the file is whole after this."""
        entries = {name: {k: v for k, v in e.items() if k != KEY} for name, e in self.entries.items()}
        header = json.dumps({"__metadata__": {"format": "pt", **(metadata or {})}, **entries}).encode()
        if len(header) > self.room:
            raise StorageError(f"{self.path}: expected a header of at most {self.room} bytes, found {len(header)}")
        self._file.seek(0)
        self._file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.sync()
        self._file.close()

    def close(self) -> None:
        """Leave the file as it is, to be gone on with."""
        self._file.close()
