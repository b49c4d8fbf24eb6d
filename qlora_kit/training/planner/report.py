"""What a plan found: a table to print, and plain data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...checkpoints.files import write_text_atomically
from .cards import CONTEXT, GIB, Card
from .estimate import Estimate
from .search import Change
from .settings import Settings


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that a training run takes. ``str(plan)`` is a table, ``to_dict()`` plain data.

    Attributes:
        model: what was planned.
        settings: how it is trained; "float16" in the place of "bfloat16" on a card without that.
        estimate: the peak, part by part.
        card: what it has to fit on; None if that wasn't said.
        by_bits: the peak at each number of bits, where a comparison was asked for.
        longest, largest: the longest sequence at this batch and the largest batch at this sequence that fit.
        changes: where it doesn't fit what would take memory off, each alone, what costs the training least first.
        way: of these what makes the run fit, and ``then`` the peak with it.
        notes: what is to be known besides.
        traffic: of several GPUs, bytes that each sends in a step of the optimizer, by what for.
    """

    model: str
    settings: Settings
    estimate: Estimate
    card: Card | None = None
    by_bits: dict[int, int] | None = None
    longest: int | None = None
    largest: int | None = None
    changes: tuple[Change, ...] = ()
    way: tuple[Change, ...] = ()
    then: int = 0
    notes: tuple[str, ...] = ()
    traffic: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Bytes of tensors at the peak."""
        return self.estimate.total

    @property
    def fits(self) -> bool | None:
        """Whether the run fits on the card; None without one."""
        return None if self.card is None else self.total <= self.card.usable

    def to_dict(self) -> dict[str, Any]:
        card = self.card
        return {
            "model": self.model,
            "settings": self.settings.to_dict(),
            "parts": dict(self.estimate.parts),
            "total": self.total,
            "moment": self.estimate.moment,
            "preparing": self.estimate.preparing,
            "paged": self.estimate.paged,
            "trained": self.estimate.trained,
            "card": None if card is None else {"name": card.name, "memory": card.memory, "usable": card.usable},
            "fits": self.fits,
            "by_bits": self.by_bits,
            "longest": self.longest,
            "largest": self.largest,
            "changes": [change.to_dict() for change in self.changes],
            "way": [dict(change.options) for change in self.way],
            "then": self.then,
            "notes": list(self.notes),
            "traffic": dict(self.traffic),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` to the file ``path`` as JSON."""
        write_text_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.settings}", *_parts(self.estimate)]
        if self.traffic:
            sent = " and ".join(f"{_size(count)} of {what}" for what, count in self.traffic.items())
            lines.append(f"each of the {self.settings.world_size} GPUs sends {sent} a step")
        if self.by_bits:
            lines += ["", f"bits  {'peak':>10}"] + [
                f"{bits:>4}  {_in_gib(total)}" for bits, total in self.by_bits.items()
            ]
        if self.card is not None:
            lines += ["", *self._on_card(self.card)]
        return "\n".join([*lines, *self.notes])

    def _on_card(self, card: Card) -> list[str]:
        room = card.usable - self.total
        lines = [
            f"{card.name}: {_size(card.memory)}, of which {_size(CONTEXT)} are taken to be CUDA's",
            f"fits, {_size(room)} to spare" if room >= 0 else f"doesn't fit: {_size(-room)} too much",
        ]
        if self.longest is not None and self.largest is not None:
            batch, seq = self.settings.batch, self.settings.seq
            long = f"{self.longest:,} tokens" if self.longest else "no sequence"
            wide = f"batch {self.largest}" if self.largest else "no batch"
            lines.append(f"the most that fits: {long} at batch {batch}, {wide} at {seq:,} tokens")
        if self.changes:
            lines += ["", f"{'saves':>10}  {'peak then':>10}  {'fits':4}  change"]
            lines += [
                f"{_in_gib(c.saves)}  {_in_gib(c.total)}  {'yes' if c.fits else 'no':4}  {spelled(c)}: {c.says}"
                for c in self.changes
            ]
        if self.way:
            made = " and ".join(spelled(change) for change in self.way)
            lines.append(f"to make it fit: {made} ({_size(self.then)})")
        elif room < 0:
            lines.append("nothing here makes it fit: take a card with more memory, or a smaller model")
        return lines


def spelled(change: Change) -> str:
    """A change as Python's arguments, which the command line puts into its own words."""
    return ", ".join(f"{name}={value!r}" for name, value in change.options.items() if name != "quant_type")


def _parts(estimate: Estimate) -> list[str]:
    rows = [*estimate.parts.items(), (f"peak, in the {estimate.moment}", estimate.total)]
    if estimate.preparing:
        rows.append(("peak while it is prepared, before", estimate.preparing))
    size, unit = (GIB, "GiB") if estimate.total >= GIB else (2**20, "MiB")
    width = max(len(name) for name, _ in rows)
    lines = [f"{'part':{width}}  {'bytes':>17}  {unit:>8}"]
    lines += [f"{name:{width}}  {count:>17,}  {_in(count, size):>8}" for name, count in rows]
    if estimate.paged:
        lines.append(f"and {_size(estimate.paged)} of optimizer states that may lie in the host's memory")
    return lines


def _in(count: int, size: int) -> str:
    """``count`` bytes in units of ``size``: a column has one unit."""
    return "<0.01" if count < size / 200 else f"{count / size:,.2f}"


def _in_gib(count: int) -> str:
    return f"{_in(count, GIB):>6} GiB"


def _size(count: int) -> str:
    size, unit = (GIB, "GiB") if count >= GIB // 100 else (2**20, "MiB")
    return f"{_in(count, size)} {unit}"
