"""LoftQ on disk: a 16-bit checkpoint in, a quantized checkpoint and its adapter out, one tensor at a time.

Memory. A tensor is read, worked on and written before the next but one is touched: the peak is a small multiple
of the largest tensor, whatever the model's size. Reading ahead, computing and writing overlap in threads.

Bits. Each module goes through the very function that starts it in memory (``starts.one_module.start_of``), with the
same number of threads inside torch, so base and adapter are bitwise those of the in-memory path.

Interruptions. Results are appended in a fixed order, and noted in the journal once they are on the disk. The same
command goes on from there and ends with the same bytes. The index and config.json come last: a folder that was
cut off is no model to any reader.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from qlora_kit.checkpoints.growing_model import check_disk, clear
from qlora_kit.checkpoints.journal import Journal
from qlora_kit.checkpoints.model_folder import identity
from qlora_kit.config.checks import check_device

from ..inputs.text import calibration_batches
from ..methods.metric import DAMPING
from ..methods.registry import needs_of
from ..starts.report import Report
from .checkpoint import Checkpoint, StoredTensor
from .checks import check_written
from .chosen_bits import allocated, check_budget, provisional
from .output import expected_bytes
from .replacements import computed, in_forward_order
from .resumed import finished_units
from .task import WORK_FOLDER, Task
from .writers import Writers

Progress = Callable[[StoredTensor, int], None]


@torch.no_grad()
def stream(task: Task, *, progress: Progress | None = None) -> Report:
    """Carry out ``task``, from where an earlier run of it stopped; its report.

    Args:
        progress: called with each unit as it is done (those of an earlier run at once) and the number of weights
            in all.

    Raises:
        StorageError, TargetError, ConfigError: source, targets or options can't work, the output holds another
            task, the budget is impossible, there is no calibration text, or the disk is too small; nothing is
            written then.
    """
    check_device("device", task.device)
    asked, task = task, provisional(task)
    checkpoint = Checkpoint(task.source, task.lora)
    task = replace(task, lora=checkpoint.config)
    # What was asked for is with the text that the model settled on, and without the bits that are still to be chosen.
    loftq = replace(asked.loftq, method=task.loftq.method, calibration=task.loftq.calibration)
    asked = replace(asked, lora=replace(asked.lora, loftq_config=loftq))
    check_disk(task.out, expected_bytes(checkpoint, task.loftq))
    check_budget(task, checkpoint)
    calibrated = task.outputs or needs_of(task.loftq.chosen_method).statistics is not None
    batches = calibration_batches(task.loftq, checkpoint.model, task.source) if calibrated else []
    weights = sum(unit.numel for unit in checkpoint.units)
    tell = progress or (lambda unit, weights: None)
    head = {"options": asked.options(), "source": identity(task.source)}
    with closing(Journal(task.out, head, WORK_FOLDER, earlier={"damping": DAMPING})) as journal:
        finished = journal.finished(unit.name for unit in checkpoint.units)
        if len(finished) == len(checkpoint.units) and (task.out / "config.json").exists():
            clear(task.out / WORK_FOLDER)
            report = Report.load(task.out)
            check_written(task.out, report)
            return report
        task = allocated(task, checkpoint, journal, batches)
        if task.budget is not None:
            before = checkpoint.lowered
            checkpoint = Checkpoint(task.source, task.lora)  # ranks may differ now
            checkpoint.lowered = {} if task.budget.ranks else before
            check_disk(task.out, expected_bytes(checkpoint, task.loftq))
        finished = finished_units(checkpoint, journal)
        with closing(Writers(task, checkpoint, journal)) as writers:
            left = [unit for unit in checkpoint.units if unit.name not in finished]
            for unit in checkpoint.units:
                if unit.name in finished:
                    tell(unit, weights)
            walk = in_forward_order(task, checkpoint, left, writers, batches) if calibrated else None
            with closing(walk or computed(task, checkpoint, left)) as results:
                for unit, made in results:
                    journal.add(writers.write(unit, made))
                    tell(unit, weights)
            return writers.finish(checkpoint)
