"""Bits under a budget for a model on disk: measured module by module, noted in the journal, then chosen."""

from __future__ import annotations

from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from qlora_kit.initializers import Request
from qlora_kit.inject import PlanEntry

from .allocate import allocation, measured
from .budget import Choice
from .calibrate import Seen
from .checkpoint import Checkpoint
from .journal import Journal
from .methods import needs_of
from .streamed import streamed_stages
from .task import Task


def provisional(task: Task) -> Task:
    """``task`` with any bits, for its plan: with a budget, modules are packed and of several types."""
    if task.budget is None:
        return task
    loftq = replace(task.loftq, quant_type=None, bits_pattern={".*": 2})
    return replace(task, lora=replace(task.lora, loftq_config=loftq))


@torch.no_grad()
def allocated(task: Task, checkpoint: Checkpoint, journal: Journal) -> Task:
    """``task`` with the bits (and ranks) that its budget allows; going on from what ``journal`` has of it.

    Raises:
        ConfigError: the budget is impossible; says the smallest possible.
    """
    if task.budget is None:
        return task
    units = {unit.entry.path: unit for unit in checkpoint.units if unit.entry is not None}
    entries = {entry.path: entry for entry in checkpoint.plan.entries}

    def measure(path: str, seen: Seen | None) -> None:
        tensor = checkpoint.reader.tensor(units[path].name)
        journal.note(path, [asdict(choice) for choice in _measured(task, checkpoint, entries[path], tensor, seen)])

    wanted = needs_of(task.loftq.method).statistics is not None and bool(entries.keys() - journal.measured.keys())
    with streamed_stages(task, checkpoint, journal.folder, wanted=wanted, measuring=True) as walk:
        for stage in walk:
            for path in stage.paths:
                if path not in journal.measured:
                    measure(path, stage.seen().get(path))
    for path in entries:
        if path not in journal.measured:
            measure(path, None)
    found = allocation(
        task.lora,
        {path: [Choice(**choice) for choice in journal.measured[path]] for path in entries},
        {path: unit.numel for path, unit in units.items()},
        task.budget,
        sum(unit.nbytes for unit in checkpoint.units if unit.entry is None),
        {path: entry.rank for path, entry in entries.items()},
    )
    return replace(task, lora=found.config)


def _measured(task: Task, checkpoint: Checkpoint, entry: PlanEntry, tensor: Tensor, seen: Seen | None) -> list[Choice]:
    assert task.budget is not None
    module, codec = checkpoint.empty_module(entry)
    module._parameters["weight"] = nn.Parameter(tensor.to(task.device), requires_grad=False)
    scaling = task.lora.scaling_of(entry.rank, entry.alpha)
    request = Request(entry.path, module, codec, entry.rank, scaling, task.lora, family=entry.family)
    return measured(codec.read(module), request, task.loftq, task.budget, seen)
