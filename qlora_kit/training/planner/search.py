"""The largest sequence and batch that fit, and the changes that would make a run fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .estimate import Estimator
from .settings import BITS, Settings

# Sequences are looked for in steps of so many tokens, and no longer than so many.
_STEP, _LONGEST = 64, 1 << 20
_MOST_ROWS = 4096
# How many times as large the next to be tried is at most: a line through two close ones promises anything.
_FAR = 16
# Of a sequence or a batch: how far the answer may be under the largest.
_NEAR = 0.02


@dataclass(frozen=True)
class Change:
    """A change of settings.

    Attributes:
        options: what to pass, by ``Settings``' names.
        says: what it does, in words.
        saves: bytes that it alone takes off the peak.
        total: the peak with it alone.
        fits: whether the run fits then.
    """

    options: dict[str, Any]
    says: str
    saves: int
    total: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def largest(cost: Callable[[int], int], room: int, start: int, step: int, most: int) -> int:
    """The largest multiple of ``step`` up to ``most`` (within 2 %) at which ``cost`` is within ``room``; 0 if none is.

    Args:
        cost: grows with its argument at least as fast as a line, so that a chord never promises too much.
        start: where to begin to look.
    """
    most = max(step, most // step * step)
    low, high = 0, max(step, min(start // step * step, most))
    costs = {high: cost(high)}
    while costs[high] <= room:
        above = _promised(costs, low, high, room, step) if low else 2 * high
        if high == most or above <= high:
            return high
        low, high = high, min(above, _FAR * high, most)
        costs[high] = cost(high)
    if not low:
        if costs.setdefault(step, cost(step)) > room:
            return 0
        low = step
    while high - low > max(step, _NEAR * low):
        share = (room - costs[low]) / (costs[high] - costs[low])
        middle = low + max(step, int((high - low) * min(max(share, 0.05), 0.95)) // step * step)
        if middle >= high:
            break
        costs[middle] = cost(middle)
        low, high = (middle, high) if costs[middle] <= room else (low, middle)
        above = low + max(step, int(_NEAR * low) // step * step)  # the chord comes from below: see whether that was it
        if low == middle and above < high:
            costs[above] = cost(above)
            low, high = (above, high) if costs[above] <= room else (low, above)
    return low


def _promised(costs: dict[int, int], low: int, high: int, room: int, step: int) -> int:
    """Where the line through ``low`` and ``high`` meets ``room``: nothing above it fits, as costs grow at least so."""
    slope = (costs[high] - costs[low]) / (high - low)
    return high + int((room - costs[high]) / slope) // step * step if slope > 0 else 2 * high


def longest_sequence(estimator: Estimator, settings: Settings, room: int) -> int:
    """Tokens a row that fit into ``room`` bytes at this batch, as many as the model has places for at most."""
    most = min(estimator.longest(settings) or _LONGEST, _LONGEST)
    step = min(_STEP, most)
    return largest(lambda seq: estimator(settings.but(seq=seq)).total, room, settings.seq, step, most)


def largest_batch(estimator: Estimator, settings: Settings, room: int) -> int:
    """Rows that fit into ``room`` bytes at this sequence."""
    return largest(lambda rows: estimator(settings.but(batch=rows)).total, room, settings.batch, 1, _MOST_ROWS)


def changes(estimator: Estimator, settings: Settings, room: int) -> tuple[Change, ...]:
    """What would take memory off, each alone, what costs the training least first; only what saves anything."""
    now, found = estimator(settings).total, []
    for options, says in _offered(estimator, settings):
        total = estimator(settings.but(**options)).total
        if total < now:
            found.append(Change(options, says, now - total, total, total <= room))
    return tuple(found)


def cheapest(
    estimator: Estimator, settings: Settings, room: int, offered: tuple[Change, ...]
) -> tuple[tuple[Change, ...], int]:
    """The changes to make so that the run fits, and the peak then: the first of ``offered`` that does it alone, or as
    many from the first on as it takes; none of them if all don't do it."""
    alone = next((change for change in offered if change.fits), None)
    if alone is not None:
        return (alone,), alone.total
    options: dict[str, Any] = {}
    made: dict[tuple[str, ...], Change] = {}
    for change in offered:
        options.update(change.options)
        made[tuple(change.options)] = change  # of two that set the same, the later
        if estimator(settings.but(**options)).total <= room:
            return _needed(estimator, settings, room, list(made.values()))
    return (), 0


def _needed(estimator: Estimator, settings: Settings, room: int, made: list[Change]) -> tuple[tuple[Change, ...], int]:
    """Of changes that make the run fit together those that it takes."""

    def total(some: list[Change]) -> int:
        return estimator(settings.but(**{k: v for change in some for k, v in change.options.items()})).total

    for change in list(made):
        if total(others := [one for one in made if one is not change]) <= room:
            made = others
    return tuple(made), total(made)


def _offered(estimator: Estimator, settings: Settings) -> Iterator[tuple[dict[str, Any], str]]:
    if settings.attention == "eager":
        yield {"attention": "sdpa"}, "attention in fused kernels"
    if not settings.chunked_loss and estimator.can_chunk(settings):
        yield {"chunked_loss": True}, "the loss a few tokens at a time"
    if settings.optimizer in ("adamw", "lion"):
        yield {"optimizer": f"{settings.optimizer}-8bit"}, "optimizer states in 8 bits"
    if not settings.checkpointing and estimator.empty(settings.but(checkpointing=True)).checkpoints:
        yield {"checkpointing": True}, "activations computed twice: a third more time"
    if settings.world_size > 1 and settings.engine in ("ddp", "zero2"):
        yield {"engine": "fsdp2"}, "weights shared out among the GPUs, gathered block by block"
    if settings.batch > 1:
        half = settings.batch // 2
        steps = settings.accumulation * -(-settings.batch // half)
        yield {"batch": half, "accumulation": steps}, "fewer rows at a time, more times"
    if settings.merge_aware is not None:
        yield {"merge_aware": None}, "not trained for its merge, which then loses more"
    for bits in BITS[BITS.index(settings.bits) + 1 :]:
        yield {"bits": bits, "quant_type": None}, f"weights in {bits} bits: the model changes"
    if settings.rank > 8:
        yield {"rank": settings.rank // 2}, "half the rank"
    if settings.seq > 512:
        yield {"seq": settings.seq // 2}, "half the sequence: what is longer is cut"
