"""Units that are finished before it is their turn to be written.

Shards and adapter are appended to in one order, by one process, so that their bytes are the same however many work.
What a process has finished before that order comes to it lies in a file of its own in the work folder, whole or not
there: it gets its name once all is on the disk. So what any process has finished is kept whatever ends the run, and the
next one, of any number of processes, takes it from there.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from qlora_kit.checkpoints.files import publish
from qlora_kit.checkpoints.growing_file import GrowingFile, header_room, read_appended
from qlora_kit.checkpoints.records import check_line, read_record
from qlora_kit.errors import StorageError

from ..starts.report import LayerReport
from .checkpoint import Checkpoint, StoredTensor
from .lines import change_of, line_of
from .resumed import check_bytes, odd
from .task import WORK_FOLDER, Replacement, Task

#: The names of such files.
PATTERN = "unit-*.safetensors"
# Of the header, for what is noted of the unit beside its tensors.
_LINE_BYTES = 16384


class Ahead:
    """The units of ``checkpoint`` that lie ready in ``task``'s work folder."""

    def __init__(self, task: Task, checkpoint: Checkpoint) -> None:
        self.task, self.checkpoint, self.folder = task, checkpoint, task.out / WORK_FOLDER
        self._numbers = {unit.name: number for number, unit in enumerate(checkpoint.units)}

    def file(self, unit: StoredTensor) -> Path:
        return self.folder / PATTERN.replace("*", f"{self._numbers[unit.name]:05d}")

    def has(self, unit: StoredTensor) -> bool:
        """Whether ``unit`` lies ready."""
        return self.file(unit).exists()

    def put(self, unit: StoredTensor, made: Replacement) -> None:
        """Keep what ``unit`` becomes; it is on the disk when this returns."""
        room = header_room((*made.base, *made.adapter))
        staged = self.file(unit).with_suffix(".safetensors.making")
        file = GrowingFile(staged, 5 * room + _LINE_BYTES)
        base, adapter = (
            {name: file.append(name, tensor) for name, tensor in part.items()} for part in (made.base, made.adapter)
        )
        file.finish({"line": json.dumps(line_of(unit, made, {"shard": 0, "base": base}, adapter))})
        publish(staged, self.file(unit))

    def take(self, unit: StoredTensor) -> Replacement:
        """What was put.

        Raises:
            StorageError: the file was changed since, or is of another run.
        """
        path = self.file(unit)
        try:
            with path.open("rb") as file:
                room = int.from_bytes(file.read(8), "little")
                if room > path.stat().st_size:
                    raise ValueError("no header")
                line = json.loads(json.loads(file.read(room))["__metadata__"]["line"])
            check_line(line)
            wrong = odd(unit, line, path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            wrong = str(error)
        if wrong or line["unit"] != unit.name:
            raise StorageError(
                f"{path}: expected what an earlier run made of {unit.name!r}, found something else "
                f"({wrong or 'of another'}); remove the output folder and begin again"
            )
        check_bytes(path, room, {**line["base"], **line["adapter"]})
        base, adapter = (
            {name: read_appended(path, room, entry) for name, entry in line[part].items()}
            for part in ("base", "adapter")
        )
        row = None if line["row"] is None else read_record(LayerReport, line["row"], path)
        return Replacement(base, adapter, line["digest"], row)

    def change(self, unit: StoredTensor) -> Tensor:
        """Q + sBA - W, float32 (out, in), of a quantized unit."""
        assert unit.entry is not None
        return change_of(self.task, self.checkpoint, unit.entry, unit.name, self.take(unit))

    def drop(self, unit: StoredTensor) -> None:
        """Forget ``unit``, which is where it belongs now."""
        self.file(unit).unlink(missing_ok=True)
