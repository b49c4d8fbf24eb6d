"""Bits under a budget for a model on disk: measured module by module, noted in the journal, then chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.checkpoints.journal import Journal
from qlora_kit.distributed.team import ALONE, Team

from ..bits.allocation import TOKENS, costs_of, decide, gradients_told, measured, undecided
from ..bits.budget import check_possible
from ..inputs.batches import evenly
from ..inputs.groups import Seen
from ..methods.registry import needs_of
from .calibration import offloaded, streamed_stages
from .checkpoint import Checkpoint
from .devices import Devices
from .resumed import noted_choices
from .task import WORK_FOLDER, Task


def provisional(task: Task) -> Task:
    """``task`` with any bits, for its plan: with a budget, modules are packed and of several types.

    Raises:
        ConfigError: types or bits are given beside a budget.
    """
    if task.budget is None:
        return task
    loftq = replace(undecided(task.loftq), bits_pattern={".*": 2})
    return replace(task, lora=replace(task.lora, loftq_config=loftq))


def check_budget(task: Task, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if ``task``'s budget is impossible, and says the smallest possible; reads no weight."""
    if task.budget is not None:
        entries, budget = checkpoint.plan.entries, task.budget
        costs = {e.path: costs_of(checkpoint.request(e, task.lora), task.loftq, budget) for e in entries}
        rank_of = {entry.path: entry.rank for entry in entries}
        check_possible(costs, _sizes(checkpoint), budget, fixed=_fixed(checkpoint), rank_of=rank_of)


@torch.no_grad()
def allocated(
    task: Task,
    checkpoint: Checkpoint,
    journal: Journal | None,
    batches: Sequence[Mapping[str, Any]],
    team: Team = ALONE,
) -> Task:
    """``task`` with the bits (and ranks) that its budget allows; going on from what ``journal`` has of it.

    Args:
        journal: of the process that leads ``team``, which shares the measuring; the others have none.
        batches: of calibration, where the method looks at the inputs.

    Raises:
        ConfigError: the budget is impossible; says the smallest possible.
    """
    if task.budget is None:
        return task
    units = {unit.entry.path: unit for unit in checkpoint.units if unit.entry is not None}
    entries = {entry.path: entry for entry in checkpoint.plan.entries}
    budget, devices = task.budget, Devices(task)
    known = set(team.from_rank(None if journal is None else list(journal.measured)) or ())

    def measure(paths: list[str], seen: Mapping[str, Seen]) -> None:
        def read(path: str) -> Tensor:
            return checkpoint.reader.tensor(units[path].name)

        def work(path: str, tensor: Tensor) -> list[dict[str, Any]]:
            request = checkpoint.request(entries[path], task.lora)
            with devices.one() as device, torch.no_grad():
                request.base._parameters["weight"] = nn.Parameter(tensor.to(device), requires_grad=False)
                weight = request.codec.read(request.base)
                found = measured(weight, request, task.loftq, budget, seen.get(path), told.get(path))
            return [asdict(choice) for choice in found]

        size = {path: units[path].numel for path in paths}
        with closing(team.shared(paths, read, work, size=size.__getitem__, workers=task.underway)) as results:
            for path, found in results:
                assert journal is not None
                journal.note(path, found)
        known.update(paths)

    wanted = needs_of(task.loftq.chosen_method).statistics is not None and bool(entries.keys() - known)
    folder = task.out / WORK_FOLDER
    told: Mapping[str, float] = {}
    if wanted:
        with offloaded(checkpoint, folder) as model:
            told = gradients_told(model, batches, entries, task.loftq, budget, team)
    few = evenly(batches, TOKENS) if wanted else batches
    with streamed_stages(task, checkpoint, folder, few, wanted=wanted, measuring=True, team=team) as walk:
        for stage in walk:
            if todo := [path for path in stage.paths if path not in known]:
                measure(todo, stage.seen())
    measure([path for path in entries if path not in known], {})
    if journal is None:
        return replace(task, lora=team.from_rank(task.lora))
    choices = {
        path: noted_choices(journal, entry, costs_of(checkpoint.request(entry, task.lora), task.loftq, budget))
        for path, entry in entries.items()
    }
    found = decide(task.lora, choices, _sizes(checkpoint), budget, _fixed(checkpoint), checkpoint.plan.entries)
    return replace(task, lora=team.from_rank(found.config))


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    return {unit.entry.path: unit.numel for unit in checkpoint.units if unit.entry is not None}


def _fixed(checkpoint: Checkpoint) -> int:
    """Bytes of what isn't quantized: stored tensors, and the buffers that a model makes itself."""
    stored = sum(unit.nbytes for unit in checkpoint.units if unit.entry is None)
    made = [(m, name) for m in checkpoint.model.modules() for name in m._non_persistent_buffers_set]
    return stored + sum(module.get_buffer(name).nbytes for module, name in made)
