"""LoftQ on disk: a 16-bit checkpoint in, a quantized checkpoint and its adapter out, one tensor at a time.

Memory. A tensor is read, worked on and written before the next but one is touched: the peak is a small multiple
of the largest tensor, whatever the model's size. Reading ahead, computing and writing overlap in threads.

Bits. Each module goes through the very function that starts it in memory (``starts.one_module.start_of``), with the
same number of threads inside torch, so base and adapter are bitwise those of the in-memory path.

Interruptions. Results are appended in a fixed order, and noted in the journal once they are on the disk. The same
command goes on from there and ends with the same bytes. The index and config.json come last: a folder that was
cut off is no model to any reader.

Several processes. One leads: it alone writes, in that order. All work, on what the journal has none of: largest first,
each on what no other has taken, and what is finished before its turn lies ready in a file of its own (``ahead``).
Calibrating, each takes its own batches through the model, and sums of moments go from one to the next in the batches'
order. So the bytes are those of one process with as many threads, and any number of processes can go on with a run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import torch

from qlora_kit.checkpoints.growing_model import check_disk, clear
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.checkpoints.model_folder import identity
from qlora_kit.config.checks import check_device
from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.injection.engine import PlanEntry

from ..inputs.text import calibration_batches
from ..methods.metric import DAMPING
from ..methods.registry import needs_of
from ..starts.report import Report
from .ahead import PATTERN, Ahead
from .checkpoint import Checkpoint, StoredTensor
from .checks import check_written
from .chosen_bits import allocated, check_budget, provisional
from .devices import Devices
from .output import expected_bytes
from .replacements import Bench, in_forward_order, together
from .resumed import finished_units
from .task import WORK_FOLDER, Replacement, Task
from .writers import Writers

Progress = Callable[[StoredTensor, int], None]


@torch.no_grad()
def stream(task: Task, *, progress: Progress | None = None, team: Team = ALONE) -> Report:
    """Carry out ``task``, from where an earlier run of it stopped; its report.

    Args:
        progress: called with each unit as it is done (those of an earlier run at once) and the number of weights
            in all.
        team: shares the work, see ``qlora_kit.distributed.joining``; all its processes call this with the same task, on
            one file system. That which leads writes, notes and is told of progress.

    Raises:
        StorageError, TargetError, ConfigError: source, targets or options can't work, the output holds another
            task, the budget is impossible, there is no calibration text, or the disk is too small; nothing is
            written then.
        ProcessesError: another process of the team has failed, or is gone; what is finished is kept.
    """
    for device in task.devices or (task.device,):
        check_device("device", device)
    asked, task = task, provisional(task)
    checkpoint = Checkpoint(task.source, task.lora)
    task = replace(task, lora=checkpoint.config)
    # What was asked for is with the text that the model settled on, and without the bits that are still to be chosen.
    loftq = replace(asked.loftq, method=task.loftq.method, calibration=task.loftq.calibration)
    asked = replace(asked, lora=replace(asked.lora, loftq_config=loftq))
    copies = 1 if team.size == 1 else 2  # what is finished before its turn lies there twice for a while
    if team.leads:
        check_disk(task.out, copies * expected_bytes(checkpoint, task.loftq))
    check_budget(task, checkpoint)
    calibrated = task.outputs or needs_of(task.loftq.chosen_method).statistics is not None
    batches = calibration_batches(task.loftq, checkpoint.model, task.source) if calibrated else []
    head = {"options": asked.options(), "source": identity(task.source)}
    with ExitStack() as opened:
        journal = None
        if team.leads:
            journal = Journal(task.out, head, WORK_FOLDER, earlier={"damping": DAMPING}, beside=PATTERN)
            opened.enter_context(closing(journal))
        if team.from_rank(journal is not None and _is_over(task, checkpoint, journal)):
            return _finished_before(task, team)
        task = allocated(task, checkpoint, journal, batches, team)
        if task.budget is not None:
            before = checkpoint.lowered
            checkpoint = Checkpoint(task.source, task.lora)  # ranks may differ now
            checkpoint.lowered = {} if task.budget.ranks else before
            if team.leads:
                check_disk(task.out, copies * expected_bytes(checkpoint, task.loftq))
        books = None
        if journal is not None:
            books = _Books(task, checkpoint, journal, progress)
            opened.enter_context(closing(books.writers))
            books.tell_finished()
        finished = team.from_rank(None if books is None else books.finished) or set()
        left = [unit for unit in checkpoint.units if unit.name not in finished]
        bench = Bench(task, checkpoint, Ahead(task, checkpoint), team, Devices(task))
        change = _no_change if books is None else partial(books.writers.change, checkpoint)
        walk = in_forward_order(bench, left, batches, change) if calibrated else together(bench, left)
        with closing(walk) as results:
            for unit, made in results:
                assert books is not None
                books.note(unit, made)
                bench.ahead.drop(unit)
        report = None if books is None else books.writers.finish(checkpoint)
        team.barrier()
        return report or Report.load(task.out)


class _Books:
    """What the process that leads writes, and tells.

    Attributes:
        finished: the units that an earlier run has written.
    """

    def __init__(self, task: Task, checkpoint: Checkpoint, journal: Journal, progress: Progress | None) -> None:
        self.finished = finished_units(checkpoint, journal)
        self.writers, self.journal, self.checkpoint = Writers(task, checkpoint, journal), journal, checkpoint
        self._tell = progress or (lambda unit, weights: None)
        self._weights = sum(unit.numel for unit in checkpoint.units)

    def tell_finished(self) -> None:
        """Tell of what an earlier run has written."""
        for unit in self.checkpoint.units:
            if unit.name in self.finished:
                self._tell(unit, self._weights)

    def note(self, unit: StoredTensor, made: Replacement) -> None:
        """Write ``made``, and that it is."""
        self.journal.add(self.writers.write(unit, made))
        self._tell(unit, self._weights)


def _is_over(task: Task, checkpoint: Checkpoint, journal: Journal) -> bool:
    """Whether an earlier run has done all."""
    finished = journal.finished(unit.name for unit in checkpoint.units)
    return len(finished) == len(checkpoint.units) and (task.out / "config.json").exists()


def _finished_before(task: Task, team: Team) -> Report:
    report = Report.load(task.out)
    if team.leads:
        clear(task.out / WORK_FOLDER)
        check_written(task.out, report)
    team.barrier()
    return report


def _no_change(entry: PlanEntry) -> None:
    """What processes have to say that don't lead."""
