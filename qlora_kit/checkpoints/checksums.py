"""A checksum of each tensor that a run writes, taken while its bytes are at hand, and held against the files later.

Shapes, names and finite numbers say nothing of a byte that flipped on a disk, a shard that another run wrote, or scales
that someone changed by hand. A CRC-32 of type, shape and stored bytes says it, at 2 GB a second on one core, which is
several times faster than disks take what is written. It tells accidents and edits apart from what was written; it is no
signature: whoever wants to can change a file and the list together.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import StorageError
from .shards import FORMAT_NAMES, ShardReader

# What a tensor's checksum is called beside its type, shape and place.
KEY = "crc32"


def checksum(tensor: Tensor) -> str:
    """Of a tensor's type and shape as safetensors names them, ``BF16 [2, 3]``, and then its bytes: 8 hexadecimal
    digits."""
    data = tensor.detach().to("cpu").contiguous().reshape(-1)
    head = f"{FORMAT_NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
    return checksum_of(memoryview(data.view(torch.uint8).numpy()) if data.numel() else b"", head)  # type: ignore[arg-type]


def checksum_of(data: bytes | memoryview, head: bytes = b"") -> str:
    """Of bytes, a configuration's say, with ``head`` before them: 8 hexadecimal digits."""
    return f"{zlib.crc32(data, zlib.crc32(head)):08x}"


def checksums_in(entries: Mapping[str, Mapping[str, object]]) -> dict[str, str]:
    """The checksums that ``entries``, as a growing file's ``append`` returns them, hold by tensor."""
    return {name: str(entry[KEY]) for name, entry in entries.items() if KEY in entry}


def check_tensors(reader: ShardReader, expected: Mapping[str, str], *, fix: str) -> int:
    """Read every tensor of a folder and compare it with what was noted; how many there are.

    Args:
        expected: checksums by tensor.
        fix: ends the message: what to do about it.

    Raises:
        StorageError: tensors are missing, others are there that weren't written, or bytes differ; names them.
    """
    missing, added = sorted(expected.keys() - set(reader)), sorted(set(reader) - expected.keys())
    if missing or added:
        found = [f"{len(n)} {what} ({_shown(n)})" for n, what in ((missing, "missing"), (added, "more")) if n]
        raise StorageError(
            f"{reader.folder}: expected the {len(expected)} tensors that were written, found {' and '.join(found)}; "
            f"{fix}"
        )
    changed = [name for name in reader if checksum(reader.tensor(name)) != expected[name]]
    if changed:
        raise StorageError(
            f"{reader.folder}: expected the bytes that were written, found {len(changed)} of {len(expected)} tensors "
            f"changed since ({_shown(changed)}); {fix}"
        )
    return len(expected)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
