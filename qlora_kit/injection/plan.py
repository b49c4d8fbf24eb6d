"""What an injection will do, as a value: a table to print, and plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .left_out import LeftOut


@dataclass(frozen=True)
class PlanEntry:
    """What one module will get. Bytes are those of the adapter (float32 factors) and of the base weight;
    ``asked_rank`` is the rank that was asked for, where the start can't have as many; ``tied_to`` the path of the
    module whose factors this one shares, if it does; ``shared`` says that another module holds the base weight too."""

    path: str
    aliases: tuple[str, ...]
    module_type: str
    codec: str
    family: str
    rank: int
    alpha: float
    trainable_parameters: int
    adapter_bytes: int
    base_bytes: int
    asked_rank: int | None = None
    tied_to: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Plan:
    """All that an injection will do. ``str(plan)`` is a table, ``to_dict()`` plain data.

    Attributes:
        entries: the modules that get a branch.
        modules_to_save: paths of those that are copied and trained whole; the head that a task brings is among them.
        left_out: where the choice of modules was left to us, what gets neither, and why.
        ties: pairs of a path in ``modules_to_save`` and of the one there whose copy's weight its copy shares.
    """

    entries: tuple[PlanEntry, ...]
    modules_to_save: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()

    @property
    def trainable_parameters(self) -> int:
        """Parameters in low-rank factors; copies for ``modules_to_save`` aren't counted."""
        return sum(entry.trainable_parameters for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "left_out": [part.to_dict() for part in self.left_out]}

    def __str__(self) -> str:
        width = max([len(entry.path) for entry in self.entries] + [6])
        lines = [
            f"{'module':{width}}  {'type':14} {'codec':9} {'rank':>4} {'alpha':>6} {'trainable':>10} {'bytes':>11}"
        ]
        lines += [
            f"{e.path:{width}}  {e.module_type:14.14} {e.codec:9} {e.rank:>4} {e.alpha:>6g} "
            f"{e.trainable_parameters:>10,} {e.adapter_bytes:>11,}"
            for e in self.entries
        ]
        lines += [f"{path:{width}}  copied and trained whole" for path in self.modules_to_save]
        lines += [str(part) for part in self.left_out]
        lines.append(f"{len(self.entries)} modules, {self.trainable_parameters:,} trainable parameters")
        return "\n".join(lines)
