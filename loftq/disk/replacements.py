"""From a stored tensor to what takes its place: on its own, or in the order of the model's forward where the method
looks at the inputs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora_kit.adapter_files.backbone import codes_digest
from qlora_kit.adapter_files.folder import PREFIX
from qlora_kit.checkpoints.pipeline import in_order
from qlora_kit.codecs import codec_for
from qlora_kit.distributed.team import Team
from qlora_kit.initializers import Start
from qlora_kit.injection.engine import PlanEntry

from ..inputs.groups import Seen
from ..methods.registry import needs_of
from ..starts.kept_dense import plain_start
from ..starts.one_module import start_of
from .ahead import Ahead
from .calibration import streamed_stages
from .checkpoint import Checkpoint, StoredTensor
from .devices import Devices
from .output import adapter_names
from .task import Replacement, Task


@dataclass(frozen=True)
class Bench:
    """What units are worked on with.

    Attributes:
        ahead: units that lie ready.
        team: shares the work.
        devices: take turns.
    """

    task: Task
    checkpoint: Checkpoint
    ahead: Ahead
    team: Team
    devices: Devices

    def read(self, unit: StoredTensor) -> Tensor | None:
        """``unit``'s tensor; None of one that lies ready."""
        return None if self.ahead.has(unit) else self.checkpoint.reader.tensor(unit.name)

    def make(self, unit: StoredTensor, tensor: Tensor | None, seen: Mapping[str, Seen]) -> Replacement:
        if tensor is None:
            return self.ahead.take(unit)
        known = None if unit.entry is None else seen.get(unit.entry.path)
        with self.devices.one() as device:
            return replacement_of(replace(self.task, device=device), self.checkpoint, unit, tensor, known)


def in_forward_order(
    bench: Bench,
    units: list[StoredTensor],
    batches: Sequence[Mapping[str, Any]],
    change: Callable[[PlanEntry], Tensor | None],
) -> Generator[tuple[StoredTensor, Replacement]]:
    """Each unit's result: calibrated ones block by block as a forward comes to them, then all others; on the process
    that leads.

    The model's own weights stay in its shards; each module reads its own while it computes. After an interruption
    the text runs through the finished blocks again, without statistics being taken of them.

    Args:
        change: D = Q + sBA - W of a module that was written in an earlier run; asked on the process that leads.
    """
    task, checkpoint, team = bench.task, bench.checkpoint, bench.team
    sequential = needs_of(task.loftq.chosen_method).sequential
    waiting = {unit.entry.path: unit for unit in units if unit.entry is not None}
    entries = {entry.path: entry for entry in checkpoint.plan.entries}
    with streamed_stages(task, checkpoint, bench.ahead.folder, batches, wanted=bool(waiting), team=team) as walk:
        for stage in walk:
            now = [waiting.pop(path) for path in stage.paths if path in waiting]
            own = {unit.entry.path: unit for unit in now if unit.entry is not None}
            seen = stage.seen() if now else {}
            if team.size > 1:
                for _ in _started(bench, now, seen):
                    pass
                if sequential:
                    team.barrier()  # all of them lie ready, and do until all have read them
                    stage.replaced.update({path: bench.ahead.change(unit) for path, unit in own.items()})
                    team.barrier()
            for unit, made in computed(bench, now, seen) if team.leads else ():
                if made.change is not None and unit.entry is not None:
                    stage.replaced[unit.entry.path] = made.change
                elif sequential and team.size == 1 and unit.entry is not None:  # it lay ready
                    stage.replaced[unit.entry.path] = bench.ahead.change(unit)
                yield unit, made
            for path in sorted(set(stage.paths) - own.keys()) if sequential else ():
                found = team.from_rank(change(entries[path]))
                assert found is not None
                stage.replaced[path] = found
            if not waiting:
                break
    rest = [unit for unit in units if unit.entry is None or unit.entry.path in waiting]
    yield from together(bench, rest)


def together(bench: Bench, units: list[StoredTensor]) -> Generator[tuple[StoredTensor, Replacement]]:
    """Each unit's result in order, on the process that leads: quantized ones are shared, the largest first, and what is
    copied is read when its turn comes."""
    if bench.team.size == 1:
        yield from computed(bench, units)
        return
    started = _started(bench, units, {})
    with closing(started):
        for unit in units if bench.team.leads else ():
            for ready in started if unit.entry is not None and not bench.ahead.has(unit) else ():
                if ready is unit:
                    break
            yield unit, bench.make(unit, bench.read(unit), {})
        for _ in started:
            pass


def _started(bench: Bench, units: Sequence[StoredTensor], seen: Mapping[str, Seen]) -> Generator[StoredTensor]:
    """Have those of ``units`` that are quantized lie ready, each made by one process; on that which leads, each of them
    as it does."""
    ready = bench.team.from_rank([unit.name for unit in units if bench.ahead.has(unit)])
    todo = [unit for unit in units if unit.entry is not None and unit.name not in ready]

    def work(unit: StoredTensor, tensor: Tensor | None) -> None:
        bench.ahead.put(unit, bench.make(unit, tensor, seen))

    shared = bench.team.shared(todo, bench.read, work, size=lambda unit: unit.numel, workers=bench.task.underway)
    with closing(shared):
        for unit, _ in shared:
            yield unit


def computed(
    bench: Bench, units: Sequence[StoredTensor], seen: Mapping[str, Seen] | None = None
) -> Generator[tuple[StoredTensor, Replacement]]:
    """Each unit's result, in order: one tensor is read ahead while as many are computed as there are workers."""

    def work(unit: StoredTensor, tensor: Tensor | None) -> Replacement:
        return bench.make(unit, tensor, seen or {})

    return in_order(units, bench.read, work, bench.task.underway)


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
