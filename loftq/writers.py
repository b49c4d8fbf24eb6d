"""The files of a streamed run while they grow, and how they come to their places."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_kit.adapter_folder import PREFIX, WEIGHTS_NAME
from qlora_kit.backbone import METADATA_KEY, combine
from qlora_kit.config import CONFIG_NAME
from qlora_kit.files import publish, write_atomically, write_text_atomically
from qlora_kit.inject import PlanEntry
from qlora_kit.journal import Journal
from qlora_kit.lowrank import delta
from qlora_kit.model_folder import other_files, task_type
from qlora_kit.shard_writer import ShardWriter, header_room, read_appended
from qlora_kit.stored import weight_of
from qlora_kit.targets import shortest_names

from .checkpoint import Checkpoint, Unit
from .output import adapter_names, quantization_config, stored_names
from .report import LayerReport, Report
from .task import WORK_FOLDER, Made, Task

ADAPTER_FOLDER = "loftq_init"


class Writers:
    """The output's files while they grow: base shards one after the other, and the adapter."""

    def __init__(self, task: Task, checkpoint: Checkpoint, journal: Journal) -> None:
        self.task, self.journal = task, journal
        self.work = task.out / WORK_FOLDER
        self.room = header_room(stored_names(checkpoint))
        placed: dict[int, dict[str, Any]] = {0: {}}
        adapter: dict[str, Any] = {}
        for line in journal.done:
            placed.setdefault(line["shard"], {}).update(line["base"])
            adapter.update(line["adapter"])
        self.current = max(placed)
        self.placed = placed
        self.shard = ShardWriter(self._part(self.current), self.room, placed[self.current])
        room = header_room(PREFIX + name for entry in checkpoint.plan.entries for name in adapter_names(entry))
        self.adapter = ShardWriter(self.work / WEIGHTS_NAME, room, adapter)

    def write(self, unit: Unit, made: Made) -> dict[str, Any]:
        """Append one unit's tensors; the journal's line for it, once they are on the disk."""
        if self.shard.entries and self.shard.size >= self.task.shard_bytes:
            self.shard.finish()
            self.current += 1
            self.placed[self.current] = {}
            self.shard = ShardWriter(self._part(self.current), self.room)
        base = {name: self.shard.append(name, tensor) for name, tensor in made.base.items()}
        adapter = {name: self.adapter.append(name, tensor) for name, tensor in made.adapter.items()}
        self.placed[self.current].update(base)
        self.shard.sync()
        if adapter:
            self.adapter.sync()
        return {
            "unit": unit.name,
            "shard": self.current,
            "base": base,
            "adapter": adapter,
            "digest": made.digest,
            "row": None if made.row is None else asdict(made.row),
        }

    def change(self, checkpoint: Checkpoint, entry: PlanEntry) -> Tensor:
        """Q + sBA - W, float32 (out, in), of a module that was finished in an earlier run."""
        line = next(line for line in self.journal.done if line["row"] and line["row"]["path"] == entry.path)
        stem = line["unit"].removesuffix("weight")
        part = self._part(line["shard"])
        tensors = {
            name.removeprefix(stem): read_appended(part, self.room, found) for name, found in line["base"].items()
        }
        module, codec = checkpoint.filled_module(entry, checkpoint.reader.tensor(line["unit"]))
        kind = line["row"]["quant_type"]
        stored = weight_of(tensors, codec.shape(module), kind, asdict(self.task.loftq), f"{part}: {stem}")
        names = [PREFIX + name for name in adapter_names(entry)]
        A, B = (read_appended(self.adapter.path, self.adapter.room, line["adapter"][name]) for name in names)
        return stored.add_(delta(A, B, self.task.lora.scaling_of(entry.rank, entry.alpha))).sub_(codec.read(module))

    def finish(self, checkpoint: Checkpoint) -> Report:
        """Put everything in its place, config.json last; run again after a kill, it ends the same."""
        task, out = self.task, self.task.out
        self.shard.finish()
        place = {unit.name: number for number, unit in enumerate(checkpoint.units)}
        lines = sorted((line for line in self.journal.done if line["row"]), key=lambda line: place[line["unit"]])
        rows = [LayerReport(**line["row"]) for line in lines]
        digests = {line["row"]["path"]: line["digest"] for line in self.journal.done if line["row"]}
        self.adapter.finish({METADATA_KEY: combine(digests)})
        count = len(self.placed)
        files = {
            index: "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            for index in self.placed
        }
        # The parts stay in the work folder until the end, so that a run that is cut off here finds them again.
        for index, name in files.items():
            _place(self._part(index), out / name)
        if count > 1:
            weight_map = {name: files[index] for index, names in self.placed.items() for name in names}
            total = sum(e["data_offsets"][1] - e["data_offsets"][0] for p in self.placed.values() for e in p.values())
            index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text_atomically(out / "model.safetensors.index.json", json.dumps(index_json, indent=2) + "\n")
        adapter_folder = out / ADAPTER_FOLDER
        adapter_folder.mkdir(exist_ok=True)
        _place(self.work / WEIGHTS_NAME, adapter_folder / WEIGHTS_NAME)
        paths = [path for entry in checkpoint.plan.entries for path in (entry.path, *entry.aliases)]
        lora = dataclasses.replace(
            task.lora,
            target_modules=shortest_names(paths, checkpoint.model),
            task_type=task.lora.task_type or task_type(checkpoint.model),
            base_model_name_or_path=str(out.resolve()),
        )
        write_atomically(adapter_folder / CONFIG_NAME, lora.as_stored().to_json())
        for file in other_files(task.source):
            shutil.copyfile(file, out / file.name)
        report = Report(source=str(task.source), options=task.options(), layers=rows, left_out=checkpoint.left_out())
        report.save(out)
        settings = json.loads((task.source / "config.json").read_text(encoding="utf-8"))
        if (stored_as := quantization_config(checkpoint, task.loftq)) is not None:
            settings["quantization_config"] = stored_as
        write_text_atomically(out / "config.json", json.dumps(settings, indent=2) + "\n")
        clear(out)
        return report

    def close(self) -> None:
        """Leave the files as they are, to be gone on with."""
        self.shard.close()
        self.adapter.close()

    def _part(self, index: int) -> Path:
        return self.work / f"part-{index:05d}.safetensors"


def _place(part: Path, target: Path) -> None:
    """Give ``target`` the bytes of ``part``: by a link to the same file, or a copy where there are no links."""
    staged = part.with_name(part.name + ".placed")
    staged.unlink(missing_ok=True)
    try:
        os.link(part, staged)
    except OSError:
        shutil.copyfile(part, staged)
    publish(staged, target)


def clear(out: Path) -> None:
    """Take away the parts that a finished run has put in their places."""
    for part in (out / WORK_FOLDER).glob("*.safetensors*"):
        part.unlink()
