"""What a journal's lines may hold: they come from a file, which another release wrote, or a disk spoiled, or anyone.

A line is checked when it is read, so that what goes on from it can rely on it; what it can't show by itself (that the
bytes are there, and are those) is checked against the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from math import prod
from typing import Any, TypeVar

from ..errors import StorageError
from .shards import FORMAT_NAMES

T = TypeVar("T")

_BYTES = {name: dtype.itemsize for dtype, name in FORMAT_NAMES.items()}
# No number of ours has more digits, and JSON's may have thousands, which neither a float nor an array holds.
_MOST = 2**63
# Of fields whose type is one of these words, whatever else it may be.
_KINDS: dict[str, tuple[type, ...]] = {"float": (float, int), "int": (int,), "str": (str,), "bool": (bool,)}


def check_line(line: Mapping[str, Any]) -> None:
    """Refuse a line that no run of ours writes.

    Raises:
        ValueError: says what.
    """
    if "measured" in line:
        measured = line["measured"]
        _expect(isinstance(line.get("path"), str), "a path beside what was measured")
        _expect(isinstance(measured, list) and all(isinstance(one, dict) for one in measured), "a list of choices")
        return
    _expect(isinstance(line.get("unit"), str), "a unit's name")
    _expect(_is_count(line.get("shard")) and line["shard"] < 1_000_000, "a shard's number")
    _expect("row" in line and isinstance(line["row"], (dict, type(None))), "a row or null")
    _expect(line["row"] is None or isinstance(line["row"].get("path"), str), "the path of its row")
    _expect(("digest" in line) == ("adapter" in line), "an adapter's tensors and the digest of their base together")
    _expect(isinstance(line.get("digest"), (str, type(None))), "a digest or null")
    for key in ("base", "adapter"):
        entries: Any = line.get(key, {} if key == "adapter" else None)
        _expect(isinstance(entries, dict), f"the tensors of {key!r} by name")
        for name, entry in entries.items():
            _expect(_is_place(entry), f"type, shape and place of {name!r}")


def read_record(kind: type[T], data: object, where: object) -> T:
    """``data``, JSON's dictionary of the dataclass ``kind``'s fields, as one.

    Raises:
        StorageError: other fields, or values of other types.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = data if isinstance(data, dict) else {}
    odd = [name for name, value in values.items() if name not in types or not _is_of(value, types[name])]
    try:
        if odd or not values:
            raise TypeError(f"unfit: {odd or data!r}")
        return kind(**values)
    except TypeError as error:
        raise StorageError(
            f"{where}: expected what a run notes of a layer ({', '.join(types)}), found another ({error}); remove the "
            "output folder and begin again"
        ) from error


def _is_of(value: object, annotation: str) -> bool:
    kinds = [kind for word in annotation.split(" | ") for kind in _KINDS.get(word, ())]
    if isinstance(value, int) and abs(value) >= _MOST:
        return False
    return not kinds or (value is None and "None" in annotation) or isinstance(value, tuple(kinds))


def _is_place(entry: object) -> bool:
    if not isinstance(entry, dict) or str(entry.get("dtype")) not in _BYTES:
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2):
        return False
    if not all(map(_is_count, (*shape, *offsets))):
        return False
    return bool(offsets[1] - offsets[0] == prod(shape) * _BYTES[str(entry["dtype"])])


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"a line without {what}")
