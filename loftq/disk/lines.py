"""What is noted of a finished unit, and what can be made of it again when it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

from qlora_kit.adapter_files.folder import PREFIX
from qlora_kit.checkpoints.quantized_tensors import weight_of
from qlora_kit.injection.engine import PlanEntry
from qlora_kit.lowrank import delta

from .checkpoint import Checkpoint, StoredTensor
from .output import adapter_names
from .task import Replacement, Task


def line_of(
    unit: StoredTensor, made: Replacement, base: Mapping[str, Any], adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """The line of a journal that says so.

    Args:
        base: ``shard``, and in ``base`` the places of the tensors in it; see ``GrowingModel.append``.
        adapter: the places of the adapter's tensors.
    """
    row = None if made.row is None else asdict(made.row)
    path = None if (adapted := unit.entry or unit.kept) is None else adapted.path
    return {"unit": unit.name, **base, "adapter": adapter, "path": path, "digest": made.digest, "row": row}


def change_of(task: Task, checkpoint: Checkpoint, entry: PlanEntry, unit: str, made: Replacement) -> Tensor:
    """Q + sBA - W, float32 (out, in), of ``entry``'s module, whose weight is ``unit``, as it was stored: bit for bit
    what its start had."""
    assert made.row is not None
    stem = unit.removesuffix("weight")
    tensors = {name.removeprefix(stem): tensor for name, tensor in made.base.items()}
    module, codec = checkpoint.filled_module(entry, checkpoint.reader.tensor(unit))
    stored = weight_of(tensors, codec.shape(module), made.row.quant_type, asdict(task.loftq), unit)
    A, B = (made.adapter[PREFIX + name] for name in adapter_names(entry))
    return stored.add_(delta(A, B, task.lora.scaling_of(entry.rank, entry.alpha))).sub_(codec.read(module))
