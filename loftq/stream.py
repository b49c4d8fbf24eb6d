"""LoftQ on disk: a 16-bit checkpoint in, a quantized checkpoint and its adapter out, one tensor at a time.

Memory. A tensor is read, worked on and written before the next but one is touched: the peak is a small multiple
of the largest tensor, whatever the model's size. Reading ahead, computing and writing overlap in threads.

Bits. Each module goes through the very function that starts it in memory (``initializer.quantized_start``), with
the same number of threads inside torch, so base and adapter are bitwise those of the in-memory path.

Interruptions. Results are appended in a fixed order, and noted in the journal once they are on the disk. The same
command goes on from there and ends with the same bytes. The index and config.json come last: a folder that was
cut off is no model to any reader.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.adapter_folder import PREFIX, WEIGHTS_NAME
from qlora_kit.backbone import METADATA_KEY, codes_digest, combine
from qlora_kit.codecs import codec_for
from qlora_kit.config import CONFIG_NAME, LoftQConfig, LoraConfig
from qlora_kit.errors import StorageError
from qlora_kit.files import publish, write_atomically, write_text_atomically
from qlora_kit.initializers import Request
from qlora_kit.shard_writer import ShardWriter, header_room
from qlora_kit.targets import shortest_names

from .checkpoint import Checkpoint, Unit, task_type
from .initializer import quantized_start
from .journal import WORK_FOLDER, Journal
from .output import adapter_names, expected_bytes, quantization_config, stored_names
from .report import LayerReport, Report

ADAPTER_FOLDER = "loftq_init"


@dataclass(frozen=True)
class Task:
    """What ``loftq init`` is asked for.

    Attributes:
        source: folder of the 16-bit model.
        out: folder to write; new, empty, or of the same task begun earlier.
        lora: targets, rank, alpha, and in ``loftq_config`` how to quantize.
        shard_bytes: a shard of the output is closed once it holds this much.
        device: where to compute.
        workers: tensors that are worked on at a time.
    """

    source: Path
    out: Path
    lora: LoraConfig
    shard_bytes: int = 5 * 10**9
    device: str = "cpu"
    workers: int = 1

    @property
    def loftq(self) -> LoftQConfig:
        return self.lora.loftq_config or LoftQConfig()

    def options(self) -> dict[str, Any]:
        """All that the output's bytes depend on besides the source."""
        lora = {k: v for k, v in self.lora.to_dict().items() if k not in ("loftq_config", "base_model_name_or_path")}
        return {**lora, **asdict(self.loftq), "shard_bytes": self.shard_bytes, "device": self.device.partition(":")[0]}


@dataclass
class Made:
    """What one unit became: tensors of the base and of the adapter by name, and what is noted of it."""

    base: dict[str, Tensor]
    adapter: dict[str, Tensor] = field(default_factory=dict)
    digest: str | None = None
    row: LayerReport | None = None


Progress = Callable[[Unit, int], None]


@torch.no_grad()
def stream(task: Task, *, progress: Progress | None = None) -> Report:
    """Carry out ``task``, from where an earlier run of it stopped; its report.

    Args:
        progress: called with each unit as it is done (those of an earlier run at once) and the number of weights
            in all.

    Raises:
        StorageError, TargetError, ConfigError: source, targets or options can't work, the output holds another
            task, or the disk is too small; nothing is written then.
    """
    checkpoint = Checkpoint(task.source, task.lora)
    _check_disk(task, checkpoint)
    weights = sum(unit.numel for unit in checkpoint.units)
    tell = progress or (lambda unit, weights: None)
    with closing(Journal(task.out, {"options": task.options(), "source": checkpoint.identity()})) as journal:
        if len(journal.done) == len(checkpoint.units) and (task.out / "config.json").exists():
            _clear(task.out)
            return Report.load(task.out)
        with closing(Writers(task, checkpoint, journal)) as writers:
            for unit, _ in zip(checkpoint.units, journal.done, strict=False):
                tell(unit, weights)
            for unit, made in _made(task, checkpoint, checkpoint.units[len(journal.done) :]):
                journal.add(writers.write(unit, made))
                tell(unit, weights)
            return writers.finish(checkpoint)


def _made(task: Task, checkpoint: Checkpoint, units: list[Unit]) -> Iterator[tuple[Unit, Made]]:
    """Each unit's result, in order: one tensor is read ahead while ``workers`` are computed."""
    waiting: deque[tuple[Unit, Future[Made]]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(task.workers) as pool:

        def work(unit: Unit, tensor: Future[Tensor]) -> Made:
            return make(task, checkpoint, unit, tensor.result())

        try:
            for unit in units:
                if len(waiting) > task.workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
                    del future
                waiting.append((unit, pool.submit(work, unit, reader.submit(checkpoint.reader.tensor, unit.name))))
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
                del future
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


@torch.no_grad()
def make(task: Task, checkpoint: Checkpoint, unit: Unit, tensor: Tensor) -> Made:
    """What ``unit``, read as ``tensor``, becomes in the output."""
    if unit.entry is None:
        return Made({unit.name: tensor})
    entry = unit.entry
    module, codec = checkpoint.empty_module(entry)
    module._parameters["weight"] = nn.Parameter(tensor.to(task.device), requires_grad=False)
    scaling = task.lora.scaling_of(entry.rank, entry.alpha)
    request = Request(entry.path, module, codec, entry.rank, scaling, task.lora, family=entry.family)
    start = quantized_start(request, task.loftq)
    assert start.base is not None
    base = start.base.state_dict()
    digest = codes_digest(codec_for(start.base).stored(start.base)[0])
    # A 4-bit weight and its module refer to each other, and would wait for the garbage collector, which counts
    # objects and not their megabytes.
    vars(start.base).clear()
    prefix = unit.name.removesuffix("weight")
    names = adapter_names(entry)
    adapter = {PREFIX + names[0]: start.A, PREFIX + names[1]: start.B}
    return Made(
        {prefix + name: value for name, value in base.items()},
        {name: value.float().cpu() for name, value in adapter.items()},
        digest,
        start.report,
    )


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

    def finish(self, checkpoint: Checkpoint) -> Report:
        """Put everything in its place, config.json last; run again after a kill, it ends the same."""
        task, out = self.task, self.task.out
        self.shard.finish()
        rows = [LayerReport(**line["row"]) for line in self.journal.done if line["row"]]
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
        for file in checkpoint.other_files():
            shutil.copyfile(file, out / file.name)
        report = Report(source=str(task.source), options=task.options(), layers=rows, left_out=checkpoint.left_out())
        report.save(out)
        settings = json.loads((task.source / "config.json").read_text(encoding="utf-8"))
        if (stored_as := quantization_config(checkpoint, task.loftq)) is not None:
            settings["quantization_config"] = stored_as
        write_text_atomically(out / "config.json", json.dumps(settings, indent=2) + "\n")
        _clear(out)
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


def _clear(out: Path) -> None:
    """Take away the parts that a finished run has put in their places."""
    for part in (out / WORK_FOLDER).glob("*.safetensors*"):
        part.unlink()


def _check_disk(task: Task, checkpoint: Checkpoint) -> None:
    """Refuse to begin what the disk can't hold."""
    needed = expected_bytes(checkpoint, task.loftq)
    folder = next(folder for folder in (task.out, *task.out.absolute().parents) if folder.exists())
    there = sum(f.stat().st_size for f in task.out.rglob("*") if f.is_file()) if task.out.exists() else 0
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise StorageError(
            f"{task.out}: expected {(needed - there) / 1e9:,.2f} GB of free disk for the output, found "
            f"{free / 1e9:,.2f} GB; free some, or choose an --out on another disk"
        )
