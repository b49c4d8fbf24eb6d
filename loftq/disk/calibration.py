"""Calibration text through a model whose weights stay in its shards: each module reads its own while it computes, or
has the block's that is being worked at kept for it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from qlora_kit.checkpoints.model_folder import plainly
from qlora_kit.distributed.team import ALONE, Team
from qlora_kit.injection.read_past import ReadPast
from qlora_kit.naming import module_at

from ..inputs.groups import Stage, stages
from ..methods.registry import needs_of
from .checkpoint import Checkpoint
from .kept_weights import keep_for_good_, keep_weights_
from .task import Task


@contextmanager
def streamed_stages(
    task: Task,
    checkpoint: Checkpoint,
    folder: Path,
    batches: Sequence[Mapping[str, Any]],
    *,
    wanted: bool = True,
    measuring: bool = False,
    team: Team = ALONE,
) -> Iterator[Iterable[Stage]]:
    """The stages of ``checkpoint``'s targeted modules, see ``groups.stages``; none if they aren't ``wanted``.

    Args:
        folder: for activations and offloaded weights; what is put there is gone after the block.
        measuring: full statistics of the original model, whatever the task's method works from.
        team: shares the batches.
    """
    if not wanted:
        yield ()
        return
    needs = needs_of(task.loftq.chosen_method)
    with offloaded(checkpoint, folder) as model:
        walk = stages(
            model,
            batches,
            [entry.path for entry in checkpoint.plan.entries],
            diagonal=needs.statistics == "diagonal" and not measuring,
            sequential=needs.sequential and not measuring,
            limit=task.activation_bytes,
            folder=folder,
            staying=keep_weights_(model, task.activation_bytes).staying,
            team=team,
        )
        with closing(walk):
            yield walk


@contextmanager
def offloaded(checkpoint: Checkpoint, folder: Path) -> Iterator[nn.Module]:
    """The checkpoint's model, each module reading its weights from the shards when it is called."""
    from transformers.utils import logging as transformers_logging

    with tempfile.TemporaryDirectory(dir=folder) as room:
        # It says that parameters are on the meta device, which is what is asked for.
        logger = logging.getLogger("accelerate.big_modeling")
        level = logger.level
        logger.setLevel(logging.ERROR)
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            kind: Any = type(checkpoint.model)
            model = kind.from_pretrained(
                checkpoint.folder,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=room,
                **plainly(checkpoint.folder),
            )
            for path in ReadPast(model).on_the_spot():
                keep_for_good_(module_at(model, path))
            yield model.eval()
        finally:
            logger.setLevel(level)
            if bars:
                transformers_logging.enable_progress_bar()
