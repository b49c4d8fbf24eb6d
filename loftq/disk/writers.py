"""The files of a streamed run while they grow, and how they come to their places."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import ExitStack
from typing import Any

from torch import Tensor

from qlora_kit.adapter_files.backbone import METADATA_KEY, combine
from qlora_kit.adapter_files.card import About, about_start, write_card
from qlora_kit.adapter_files.folder import WEIGHTS_NAME
from qlora_kit.checkpoints.checksums import checksums_in
from qlora_kit.checkpoints.files import write_text_atomically
from qlora_kit.checkpoints.growing_file import GrowingFile, header_room, read_appended
from qlora_kit.checkpoints.growing_model import GrowingModel, clear, place
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.checkpoints.model_folder import other_files, read_settings
from qlora_kit.checkpoints.records import read_record
from qlora_kit.config.lora import CONFIG_NAME
from qlora_kit.injection.engine import PlanEntry
from qlora_kit.injection.targets import shortest_names

from ..starts.report import LayerReport, Report
from .checkpoint import Checkpoint, StoredTensor
from .checks import ADAPTER, ADAPTER_FOLDER, CONFIGS, MODEL, config_checksum
from .lines import change_of, line_of
from .output import adapter_keys, base_names, quantization_config
from .resumed import check_bytes
from .task import WORK_FOLDER, Replacement, Task


class Writers:
    """The output's files while they grow: base shards one after the other, and the adapter."""

    def __init__(self, task: Task, checkpoint: Checkpoint, journal: Journal) -> None:
        self.task, self.journal = task, journal
        self.work = task.out / WORK_FOLDER
        self.storage = quantization_config(checkpoint, task.loftq)
        placed = {name: entry for line in journal.done for name, entry in line["adapter"].items()}
        names = [name for unit in checkpoint.units for name in base_names(unit)]
        room = header_room(key for unit in checkpoint.units for key in adapter_keys(unit))
        with ExitStack() as opened:  # closed again if what an earlier run left isn't what it noted
            self.model = GrowingModel(self.work, names, task.shard_bytes, journal.done)
            opened.callback(self.model.close)
            self.adapter = GrowingFile(self.work / WEIGHTS_NAME, room, placed)
            opened.callback(self.adapter.close)
            for number, entries in self.model.placed.items():
                check_bytes(self.model.part(number), self.model.room, entries)
            check_bytes(self.adapter.path, room, placed)
            opened.pop_all()

    def write(self, unit: StoredTensor, made: Replacement) -> dict[str, Any]:
        """Append one unit's tensors; the journal's line for it, once they are on the disk."""
        base = self.model.append(made.base)
        adapter = {name: self.adapter.append(name, tensor) for name, tensor in made.adapter.items()}
        if adapter:
            self.adapter.sync()
        return line_of(unit, made, base, adapter)

    def change(self, checkpoint: Checkpoint, entry: PlanEntry) -> Tensor:
        """Q + sBA - W, float32 (out, in), of a module that was finished in an earlier run."""
        line = next(line for line in self.journal.done if line["row"] and line["row"]["path"] == entry.path)
        part = self.model.part(line["shard"])
        base = {name: read_appended(part, self.model.room, found) for name, found in line["base"].items()}
        adapter = {
            name: read_appended(self.adapter.path, self.adapter.room, found) for name, found in line["adapter"].items()
        }
        made = Replacement(base, adapter, row=read_record(LayerReport, line["row"], self.journal.path))
        return change_of(self.task, checkpoint, entry, line["unit"], made)

    def finish(self, checkpoint: Checkpoint) -> Report:
        """Put everything in its place, config.json last; run again after a kill, it ends the same."""
        task, out = self.task, self.task.out
        order = {unit.name: number for number, unit in enumerate(checkpoint.units)}
        lines = sorted((line for line in self.journal.done if line["row"]), key=lambda line: order[line["unit"]])
        rows = [read_record(LayerReport, line["row"], self.journal.path) for line in lines]
        # Journals of earlier releases name the path in the report's row alone.
        made = [line for line in self.journal.done if line["digest"]]
        digests = {line.get("path") or line["row"]["path"]: line["digest"] for line in made}
        self.adapter.finish({METADATA_KEY: combine(digests)})
        self.model.place(out)
        self.model.write_index(out)
        adapter_folder = out / ADAPTER_FOLDER
        adapter_folder.mkdir(exist_ok=True)
        place(self.work / WEIGHTS_NAME, adapter_folder / WEIGHTS_NAME)
        paths = [path for entry in checkpoint.adapted for path in (entry.path, *entry.aliases)]
        lora = dataclasses.replace(
            task.lora,
            target_modules=shortest_names(paths, checkpoint.model),
            task_type=checkpoint.task_type,
            modules_to_save=checkpoint.modules_to_save,
            base_model_name_or_path=str(out.resolve()),
        )
        configs = {
            f"{ADAPTER_FOLDER}/{CONFIG_NAME}": lora.as_stored().to_json().decode(),
            "config.json": self._settings(),
        }
        write_text_atomically(adapter_folder / CONFIG_NAME, configs[f"{ADAPTER_FOLDER}/{CONFIG_NAME}"])
        write_card(adapter_folder, lora.as_stored(), About(about_start(lora, rows)))
        for file in other_files(task.source):
            shutil.copyfile(file, out / file.name)
        report = Report(
            source=str(task.source),
            options=task.options(),
            layers=rows,
            left_out=checkpoint.left_out(),
            kept=checkpoint.reasons,
            lowered=checkpoint.lowered,
            checksums={
                MODEL: self.model.checksums(),
                ADAPTER: checksums_in(self.adapter.entries),
                CONFIGS: {name: config_checksum(text) for name, text in configs.items()},
            },
            source_bytes=sum(unit.nbytes for unit in checkpoint.units),
        )
        report.save(out)
        write_text_atomically(out / "config.json", configs["config.json"])
        clear(self.work)
        return report

    def _settings(self) -> str:
        """The output's config.json."""
        settings = read_settings(self.task.source)
        if self.storage is not None:
            settings["quantization_config"] = self.storage
        return json.dumps(settings, indent=2) + "\n"

    def close(self) -> None:
        """Leave the files as they are, to be gone on with."""
        self.model.close()
        self.adapter.close()
