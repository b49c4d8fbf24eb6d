"""What an extraction took over into an adapter, and what it left: numbers by module and by tensor, and their sums.

All shares are of one whole, the squared Frobenius norm of everything that differs: a tied tensor counts once, and
what has no counterpart in the base (a new head, a longer vocabulary) doesn't count, since it is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from ...lowrank.algebra.records import FILLED_UP

#: How a tensor outside the low-rank part is stored: not at all, in a whole module, or as a bias.
LEFT, WHOLE, BIAS = "left", "whole", "bias"


@dataclass(frozen=True)
class ExtractedModule:
    """One module's low-rank branch.

    Attributes:
        rank: of the branch. size: ||difference||, the Frobenius norm. relative: ||difference|| / ||base weight||.
        captured: share of the squared norm of the difference that the branch, as it is stored, reproduces.
        error: ||difference - branch|| / ||difference||.
    """

    path: str
    rank: int
    size: float
    relative: float
    captured: float
    error: float


@dataclass(frozen=True)
class OtherTensor:
    """A tensor that differs and isn't the weight of a module with a branch.

    Attributes:
        size, relative: as of a module; None where the base has no tensor of this name and shape.
        stored: "left" (not in the adapter), "whole" (a part of a module in modules_to_save) or "bias".
    """

    name: str
    size: float | None
    relative: float | None
    stored: str = LEFT


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction found and stored. ``str(report)`` is a table, ``to_dict()`` plain data.

    Attributes:
        base, tuned: the folders.
        modules: those with a branch, in the model's order.
        equal: targeted modules without a difference, which have no branch.
        others: every other tensor that differs.
        only_base: tensors that only the base's class has, such as its head.
        filled_to: the rank that all factors were given by zeros, if the modules have several.
    """

    base: str
    tuned: str
    modules: tuple[ExtractedModule, ...]
    equal: tuple[str, ...] = ()
    others: tuple[OtherTensor, ...] = ()
    only_base: tuple[str, ...] = ()
    filled_to: int | None = None

    @property
    def total(self) -> float:
        """The squared norm of all that differs."""
        return self._branches + self._others(LEFT, WHOLE, BIAS)

    @property
    def captured(self) -> float:
        """The share of ``total`` that the adapter reproduces: by branches, whole modules and biases."""
        held = sum(module.captured * module.size**2 for module in self.modules)
        return (held + self._others(WHOLE, BIAS)) / self.total

    @property
    def left(self) -> float:
        """The share of ``total`` in tensors that the adapter says nothing of."""
        return self._others(LEFT) / self.total

    @property
    def captured_by_rank(self) -> float:
        """The share of the squared norm of the adapted modules' differences that their branches reproduce."""
        return sum(module.captured * module.size**2 for module in self.modules) / self._branches

    def to_dict(self) -> dict[str, Any]:
        sums = {name: getattr(self, name) for name in ("total", "captured", "left", "captured_by_rank")}
        return {**asdict(self), **sums}

    def __str__(self) -> str:
        groups = _grouped(self.others)
        width = max([len(module.path) for module in self.modules] + [len(group) for group in groups] + [6])
        lines = [f"{'module':{width}}  {'rank':>5} {'relative':>9} {'share':>9} {'captured':>9} {'error':>9}"]
        lines += [
            f"{m.path:{width}}  {m.rank:>5} {m.relative:>9.2e} {m.size**2 / self.total:>9.4%} {m.captured:>9.4%} "
            f"{m.error:>9.2e}"
            for m in self.modules
        ]
        for name, tensors in groups.items():
            lines.append(f"{name:{width}}  {self._described(tensors)}")
        if self.equal:
            lines.append(f"without a difference, so without a branch: {', '.join(self.equal)}")
        if self.only_base:
            lines.append(f"of the base's own class (a head), which the tuned model hasn't: {', '.join(self.only_base)}")
        if self.filled_to is not None:
            lines.append(FILLED_UP.format(self.filled_to))
        lines.append(
            f"{len(self.modules)} modules: branches hold {self.captured_by_rank:.4%} of their squared difference, the "
            f"adapter {self.captured:.4%} of all there is; {self.left:.4%} is in tensors left out"
        )
        if any(tensor.stored == LEFT for tensor in self.others):
            lines.append("whole='changed', or names of modules, stores whole what has an untied module")
        return "\n".join(lines)

    @property
    def _branches(self) -> float:
        return sum(module.size**2 for module in self.modules)

    def _others(self, *stored: str) -> float:
        return sum((tensor.size or 0.0) ** 2 for tensor in self.others if tensor.stored in stored)

    def _described(self, tensors: list[OtherTensor]) -> str:
        how = {LEFT: "LEFT OUT", WHOLE: "stored whole", BIAS: "stored as biases"}[tensors[0].stored]
        sizes = [tensor.relative for tensor in tensors if tensor.relative is not None]
        found = f"relative {max(sizes):.2e}" if len(sizes) == 1 else f"relative up to {max(sizes, default=0):.2e}"
        found = found if sizes else "not in the base in this shape"
        share = sum((tensor.size or 0.0) ** 2 for tensor in tensors) / self.total
        count = "" if len(tensors) == 1 else f"{len(tensors)} tensors, "
        return f"{how}: {count}{found}, share {share:.4%}"


def _grouped(tensors: Iterable[OtherTensor]) -> dict[str, list[OtherTensor]]:
    """Alike ones, of all layers and experts, under one name; apart where they are stored in different ways."""
    groups: dict[tuple[str, str, bool], list[OtherTensor]] = {}
    for tensor in tensors:
        pattern = re.sub(r"\.\d+(?=\.)", ".*", tensor.name)
        groups.setdefault((pattern, tensor.stored, tensor.size is None), []).append(tensor)
    shown: dict[str, list[OtherTensor]] = {}
    for (pattern, *_), found in groups.items():
        name = found[0].name if len(found) == 1 else pattern
        # One pattern may be stored in two ways: the first tensor's own name tells them apart.
        shown[name if name not in shown else f"{found[0].name}, ..."] = found
    return shown
