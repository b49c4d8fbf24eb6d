"""From a stored tensor to what takes its place: on its own, or in the order of the model's forward where the method
looks at the inputs."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapter_files.backbone import codes_digest
from qlora_kit.adapter_files.folder import PREFIX
from qlora_kit.checkpoints.pipeline import in_order
from qlora_kit.codecs import codec_for
from qlora_kit.initializers import Start
from qlora_kit.injection.engine import PlanEntry

from ..inputs.groups import Seen
from ..methods.registry import needs_of
from ..starts.kept_dense import plain_start
from ..starts.one_module import start_of
from .calibration import streamed_stages
from .checkpoint import Checkpoint, StoredTensor
from .output import adapter_names
from .task import Replacement, Task
from .writers import Writers


def in_forward_order(
    task: Task,
    checkpoint: Checkpoint,
    units: list[StoredTensor],
    writers: Writers,
    batches: Sequence[Mapping[str, Any]],
) -> Generator[tuple[StoredTensor, Replacement]]:
    """Each unit's result: calibrated ones block by block as a forward comes to them, then all others.

    The model's own weights stay in its shards; each module reads its own while it computes. After an interruption
    the text runs through the finished blocks again, without statistics being taken of them.
    """
    needs = needs_of(task.loftq.chosen_method)
    waiting = {unit.entry.path: unit for unit in units if unit.entry is not None}
    entries = {entry.path: entry for entry in checkpoint.plan.entries}
    with streamed_stages(task, checkpoint, writers.work, batches, wanted=bool(waiting)) as walk:
        for stage in walk:
            now = [waiting.pop(path) for path in stage.paths if path in waiting]
            finished = set(stage.paths) - {unit.entry.path for unit in now if unit.entry is not None}
            for unit, made in computed(task, checkpoint, now, stage.seen() if now else {}):
                if made.change is not None and unit.entry is not None:
                    stage.replaced[unit.entry.path] = made.change
                yield unit, made
            for path in sorted(finished) if needs.sequential else ():
                stage.replaced[path] = writers.change(checkpoint, entries[path])
            if not waiting:
                break
    rest = [unit for unit in units if unit.entry is None or unit.entry.path in waiting]
    yield from computed(task, checkpoint, rest)


def computed(
    task: Task, checkpoint: Checkpoint, units: list[StoredTensor], seen: Mapping[str, Seen] | None = None
) -> Generator[tuple[StoredTensor, Replacement]]:
    """Each unit's result, in order: one tensor is read ahead while ``workers`` are computed."""

    def read(unit: StoredTensor) -> Tensor:
        return checkpoint.reader.tensor(unit.name)

    def work(unit: StoredTensor, tensor: Tensor) -> Replacement:
        known = None if unit.entry is None or seen is None else seen.get(unit.entry.path)
        return replacement_of(task, checkpoint, unit, tensor, known)

    return in_order(units, read, work, task.workers)


@torch.no_grad()
def replacement_of(
    task: Task, checkpoint: Checkpoint, unit: StoredTensor, tensor: Tensor, seen: Seen | None = None
) -> Replacement:
    """What ``unit``, read as ``tensor``, becomes in the output; ``seen`` is what is known of its inputs."""
    if unit.entry is None:
        return _as_it_was(task, checkpoint, unit, tensor)
    entry = unit.entry
    request = checkpoint.request(entry, task.lora, tensor.to(task.device))
    changes: list[Tensor] | None = None
    if needs_of(task.loftq.chosen_method).sequential and seen is not None:
        changes = []
    start = start_of(request, task.loftq, seen, changes)
    assert start.base is not None
    base = start.base.state_dict()
    digest = codes_digest(codec_for(start.base).stored(start.base)[0])
    # A 4-bit weight and its module refer to each other, and would wait for the garbage collector, which counts
    # objects and not their megabytes.
    vars(start.base).clear()
    prefix = unit.name.removesuffix("weight")
    return Replacement(
        {prefix + name: value for name, value in base.items()},
        _adapter(entry, start),
        digest,
        start.report,
        changes[0] if changes else None,
    )


def _as_it_was(task: Task, checkpoint: Checkpoint, unit: StoredTensor, tensor: Tensor) -> Replacement:
    """``unit`` unchanged; with a plain start where its module is targeted and stays dense, and copied into the adapter
    where that trains it whole."""
    if unit.copied_as is not None:
        return Replacement(
            {unit.name: tensor}, {unit.copied_as: tensor.float() if tensor.is_floating_point() else tensor}
        )
    if unit.kept is None:
        return Replacement({unit.name: tensor})
    start = plain_start(
        checkpoint.request(unit.kept, task.lora, tensor), task.loftq, checkpoint.reasons[unit.kept.path]
    )
    return Replacement({unit.name: tensor}, _adapter(unit.kept, start), codes_digest(tensor))


def _adapter(entry: PlanEntry, start: Start) -> dict[str, Tensor]:
    """The start's factors in float32 under the names of an adapter file."""
    names = (PREFIX + name for name in adapter_names(entry))
    return {name: factor.float().cpu() for name, factor in zip(names, (start.A, start.B), strict=True)}
