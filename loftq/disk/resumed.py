"""What the journal of an earlier run says, held against what is to be done and against the files: it comes from a disk.

``checkpoints.records`` checks a line by itself; here are the tensors that each unit of *this* run may have, and the
bytes that were written of them, as long as only a checksum can tell them from those.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qlora_kit.checkpoints.checksums import KEY, checksum
from qlora_kit.checkpoints.growing_file import read_appended
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.checkpoints.records import read_record
from qlora_kit.errors import StorageError
from qlora_kit.injection.engine import PlanEntry

from ..bits.budget import Choice
from ..starts.report import LayerReport
from .checkpoint import Checkpoint, StoredTensor
from .output import adapter_keys, base_names


def finished_units(checkpoint: Checkpoint, journal: Journal) -> set[str]:
    """Names of the units that are done, each with the tensors that this run has of it.

    Raises:
        StorageError: a line is of no unit of this run, is there twice, or names other tensors.
    """
    finished = journal.finished(unit.name for unit in checkpoint.units)
    units = {unit.name: unit for unit in checkpoint.units}
    for line in journal.done:
        if wrong := odd(units[line["unit"]], line, journal.path):
            raise journal.damaged(f"of {line['unit']!r} it says {wrong}")
    return finished


def check_bytes(path: Path, room: int, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Read again what an earlier run appended to ``path`` (see ``GrowingFile``), and compare it with its checksums.

    Raises:
        StorageError: names a tensor that isn't what was written, or of which nothing is there.
    """
    for name, entry in entries.items():
        if KEY not in entry:  # noted by an earlier release
            continue
        try:
            found = checksum(read_appended(path, room, entry))
        except (OSError, ValueError, RuntimeError) as error:  # no such file, or one that ends before
            found = str(error)
        if found != entry[KEY]:
            raise StorageError(
                f"{path}: expected {name!r} as an earlier run wrote it, found it changed since, or cut off; remove the "
                "output folder and begin again"
            )


def noted_choices(journal: Journal, entry: PlanEntry, possible: Iterable[Choice]) -> list[Choice]:
    """What was measured of ``entry``'s module: the choices that are ``possible``, with their errors.

    Raises:
        StorageError: others were, or an error is no number.
    """
    found = [read_record(Choice, choice, journal.path) for choice in journal.measured[entry.path]]
    if [(c.bits, c.rank) for c in found] != [(c.bits, c.rank) for c in possible]:
        raise journal.damaged(f"of {entry.path!r} it says what other bits or ranks leave")
    if not all(math.isfinite(number) and number >= 0 for c in found for number in (c.error, c.importance or 0.0)):
        raise journal.damaged(f"of {entry.path!r} it says an error that is none")
    return found


def odd(unit: StoredTensor, line: Mapping[str, Any], path: Path) -> str:
    """What is wrong with a line of ``unit``; empty if nothing."""
    adapted, row = unit.entry or unit.kept, line["row"]
    if (row is not None) != (unit.entry is not None) or ("digest" not in line):
        return "that it was quantized, or wasn't, against what is to be done"
    if (line["digest"] is not None) != (adapted is not None):
        return "a digest of its codes, or none, against what is to be done"
    if row is not None and unit.entry is not None:
        found = read_record(LayerReport, row, path)
        if (found.path, found.rank) != (unit.entry.path, unit.entry.rank):
            return f"that it is {found.path!r} with rank {found.rank}"
    if adapted is not None and line.get("path", adapted.path) != adapted.path:
        return f"that it is {line['path']!r}"
    base, names = set(line["base"]), set(base_names(unit))
    if not {unit.name} <= base <= names:
        return f"that {sorted(base ^ {unit.name})[:3]} are its tensors"
    if set(line["adapter"]) != (expected := set(adapter_keys(unit))):
        return f"that {sorted(set(line['adapter']) ^ expected)[:3]} are, or aren't, in its adapter"
    return ""
