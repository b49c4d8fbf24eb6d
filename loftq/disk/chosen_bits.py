"""Bits under a budget for a model on disk: measured module by module, noted in the journal, then chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from qlora_kit.checkpoints.journal import Journal

from ..bits.allocation import costs_of, decide, measured, undecided
from ..bits.budget import check_possible
from ..inputs.groups import Seen
from ..methods.registry import needs_of
from .calibration import streamed_stages
from .checkpoint import Checkpoint
from .resumed import noted_choices
from .task import Task


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
def allocated(task: Task, checkpoint: Checkpoint, journal: Journal, batches: Sequence[Mapping[str, Any]]) -> Task:
    """``task`` with the bits (and ranks) that its budget allows; going on from what ``journal`` has of it.

    Args:
        batches: of calibration, where the method looks at the inputs.

    Raises:
        ConfigError: the budget is impossible; says the smallest possible.
    """
    if task.budget is None:
        return task
    units = {unit.entry.path: unit for unit in checkpoint.units if unit.entry is not None}
    entries = {entry.path: entry for entry in checkpoint.plan.entries}
    budget = task.budget

    def measure(path: str, seen: Seen | None) -> None:
        request = checkpoint.request(entries[path], task.lora)
        tensor = checkpoint.reader.tensor(units[path].name)
        request.base._parameters["weight"] = nn.Parameter(tensor.to(task.device), requires_grad=False)
        found = measured(request.codec.read(request.base), request, task.loftq, budget, seen)
        journal.note(path, [asdict(choice) for choice in found])

    wanted = needs_of(task.loftq.chosen_method).statistics is not None and bool(
        entries.keys() - journal.measured.keys()
    )
    with streamed_stages(task, checkpoint, journal.folder, batches, wanted=wanted, measuring=True) as walk:
        for stage in walk:
            for path in stage.paths:
                if path not in journal.measured:
                    measure(path, stage.seen().get(path))
    for path in entries:
        if path not in journal.measured:
            measure(path, None)
    choices = {
        path: noted_choices(journal, entry, costs_of(checkpoint.request(entry, task.lora), task.loftq, budget))
        for path, entry in entries.items()
    }
    found = decide(task.lora, choices, _sizes(checkpoint), budget, _fixed(checkpoint), checkpoint.plan.entries)
    return replace(task, lora=found.config)


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    return {unit.entry.path: unit.numel for unit in checkpoint.units if unit.entry is not None}


def _fixed(checkpoint: Checkpoint) -> int:
    """Bytes of what isn't quantized: stored tensors, and the buffers that a model makes itself."""
    stored = sum(unit.nbytes for unit in checkpoint.units if unit.entry is None)
    made = [(m, name) for m in checkpoint.model.modules() for name in m._non_persistent_buffers_set]
    return stored + sum(module.get_buffer(name).nbytes for module, name in made)
