"""A step of a deep model from those of two shallow ones.

Layers that are alike do alike: each keeps as many bytes in the forward and leaves as many gradients in the backward. So
a model that is cut to few of them and one with a few more hold, at corresponding moments, amounts on a straight line
from which the whole model's is read off. Moments correspond that are as many operations from the beginning of a pass,
or from its end, and differ by the same as the first (or the last) of the pass. Each moment of the shallower model has
to correspond in one of the ways, or nothing is concluded and the model is traced whole. Layers in the middle are on the
line between the first and the last, so they are never the peak.

Layers are alike from some layer on and with some period (five local, one global), by what they consist of and by the
settings in them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from .live import KINDS
from .step import Trace

# Of a period: more is no pattern.
_LONGEST = 12
# Numbers that tell a layer's place, not its kind.
_PLACES = ("idx", "index", "_id", "number")


@dataclass(frozen=True)
class Stack:
    """Layers of a model, alike from ``start`` on with a period of ``period``."""

    parent: nn.Module
    name: str
    layers: nn.ModuleList
    start: int
    period: int

    @property
    def short(self) -> int:
        """How many layers show all: those before the pattern, it twice (three at least), and what is over."""
        least = self.start + max(2 * self.period, 3)
        return least + (len(self.layers) - least) % self.period

    @property
    def left(self) -> int:
        """How many more periods the whole has."""
        return (len(self.layers) - self.short) // self.period

    @contextmanager
    def cut(self, periods: int) -> Iterator[None]:
        """The model with ``short`` layers and ``periods`` periods more."""
        self.parent._modules[self.name] = self.layers[: self.short + periods * self.period]
        try:
            yield
        finally:
            self.parent._modules[self.name] = self.layers


def stack_of(model: nn.Module) -> Stack | None:
    """The longest list of layers with a pattern in it; None where nothing is saved by cutting it."""
    found = [stack for stack in _stacks(model) if stack.left > 1]
    return max(found, key=lambda stack: stack.left * stack.period, default=None)


def _stacks(model: nn.Module) -> Iterator[Stack]:
    kinds = getattr(getattr(model, "config", None), "layer_types", None)
    for parent in model.modules():
        for name, layers in parent._modules.items():
            if isinstance(layers, nn.ModuleList) and len(layers) > 3:
                marks = [_mark(layer) for layer in layers]
                if isinstance(kinds, list) and len(kinds) == len(layers):
                    marks = list(zip(marks, kinds, strict=True))
                start, period = _pattern(marks)
                yield Stack(parent, name, layers, start, period)


def _pattern(marks: list[Any]) -> tuple[int, int]:
    """From where on, and with which period, ``marks`` repeat: what leaves the fewest to look at."""
    found = []
    for period in range(1, min(len(marks) // 2, _LONGEST) + 1):
        differing = [i for i in range(len(marks) - period) if marks[i] != marks[i + period]]
        found.append((differing[-1] + 1 if differing else 0, period))
    return min(found, key=lambda pair: pair[0] + 3 * pair[1])


def _mark(layer: nn.Module) -> tuple[Any, ...]:
    """What layers that are alike have in common."""
    settings = (
        (name, value)
        for module in layer.modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and not name.endswith(_PLACES)
    )
    sizes = ((tuple(p.shape), p.dtype) for p in layer.parameters())
    return repr(layer), tuple(settings), tuple(sizes)


def extended(short: Trace, longer: Trace, left: int) -> tuple[dict[str, int], str] | None:
    """What the whole model holds at its peak, and in which pass.

    Args:
        short, longer: of the model cut to the least, and with one period more.
        left: periods that the whole has more than ``short``.

    Returns:
        None where a moment of ``short`` has none that corresponds.
    """
    peaks = []
    for name, one, two in zip(("forward", "backward"), _passes(short), _passes(longer), strict=True):
        moments = _on_the_line(one, two, left)
        if moments is None:
            return None
        if len(moments):
            peaks.append((moments[moments.sum(1).argmax()], name))
    moment, name = max(peaks, key=lambda peak: int(peak[0].sum()))
    return _by_kind(moment), name


def peak_of(trace: Trace) -> tuple[dict[str, int], str]:
    """What is held at the peak of a trace, by kind, and in which pass that is."""
    moments = np.array(trace.moments)
    place = int(moments.sum(1).argmax())
    return _by_kind(moments[place]), "forward" if place < trace.forward else "backward"


def _on_the_line(one: np.ndarray, two: np.ndarray, left: int) -> np.ndarray | None:
    """Moments of the whole model's pass, from those of a shallow one and of one that is a period deeper."""
    count = len(one)
    if not count:
        return one
    from_begin, from_end = two[:count] - one, two[-count:] - one
    first, last = from_begin[0], from_end[-1]
    early, late = (from_begin == first).all(1), (from_end == last).all(1)
    if not (early | late).all():
        return None
    return np.concatenate([one[early] + left * first, one[late] + left * last])


def _passes(trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    moments = np.array(trace.moments)
    return moments[: trace.forward], moments[trace.forward :]


def _by_kind(moment: np.ndarray) -> dict[str, int]:
    return dict(zip(KINDS, map(int, moment), strict=True))
