"""``plan_memory``: what a training run takes, whether it fits, and what would make it fit."""

from __future__ import annotations

import os
from typing import Any

from ...checkpoints.model_folder import stored_by
from ...config.checks import failure
from .cards import Card, card_named
from .estimate import Estimator
from .report import MemoryPlan
from .search import changes, cheapest, largest_batch, longest_sequence
from .settings import BITS, Settings
from .world import traffic


def plan_memory(
    model: str | os.PathLike[str],
    *,
    gpu: str | None = None,
    memory: int | None = None,
    compare: bool = False,
    **settings: Any,
) -> MemoryPlan:
    """The memory that adapters on ``model`` take to train, from its configuration alone.

    A step is run on tensors without values (the meta device), by the code that trains, and what it holds is counted;
    see ``live``. No weights are downloaded or made.

    Args:
        model: a folder with a config.json, or a name on the Hub, of which that file alone is fetched.
        gpu: a name of ``cards.CARDS``: "t4", "4090", "h100".
        memory: bytes of a card, in the place of its name or of what that has.
        compare: find the peak at every number of bits too.
        settings: see ``Settings``: bits, rank, seq, batch, targets, dtype, optimizer, checkpointing, ...

    Returns:
        Bytes by part at the peak, on each of ``world_size`` GPUs. With a card also whether that fits, the longest
        sequence and the largest batch that do, and where it doesn't what to change.

    Raises:
        ConfigError: a setting that can't work, a card that isn't known, a model whose forward looks at values.
        StorageError: no configuration at ``model``, or one of a model that transformers doesn't have.
        TargetError: the targets select nothing.
    """
    card = None if gpu is None else card_named(gpu)
    if memory is not None:
        if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
            raise failure("memory", "a number of bytes", memory, "pass memory=12 * 2**30")
        card = Card(card.name if card else "card", memory, card.ampere if card else True)
    unknown = sorted(set(settings) - set(Settings.__dataclass_fields__))
    if unknown:
        raise failure("settings", f"some of {sorted(Settings.__dataclass_fields__)}", unknown, "correct the names")
    asked = Settings(**settings)
    notes = []
    if card is not None and not card.ampere and asked.dtype == "bfloat16":
        asked = asked.but(dtype="float16")
        notes.append(f"{card.name} has no bfloat16: planned, and to be trained, in float16 (dtype='float16')")
    estimator = Estimator(model, flash=card is None or card.ampere)
    estimate = estimator(asked)
    notes += _notes(estimator, asked)
    found: dict[str, Any] = {}
    if compare:
        found["by_bits"] = {bits: estimator(_at(asked, bits)).total for bits in BITS}
    if card is not None:
        found["longest"] = longest_sequence(estimator, asked, card.usable)
        found["largest"] = largest_batch(estimator, asked, card.usable)
        if estimate.total > card.usable:
            found["changes"] = changes(estimator, asked, card.usable)
            found["way"], found["then"] = cheapest(estimator, asked, card.usable, found["changes"])
    sent = traffic(estimator.empty(asked), asked)
    return MemoryPlan(str(model), asked, estimate, card, notes=tuple(notes), traffic=sent, **found)


def _at(settings: Settings, bits: int) -> Settings:
    """The same at another number of bits, in the type that is usual for it."""
    if bits == settings.bits:
        return settings
    rounded = bits < 16 or settings.merge_aware != "same"  # a merge into 16 bits rounds to no fewer
    return settings.but(bits=bits, quant_type=None, merge_aware=settings.merge_aware if rounded else None)


def _notes(estimator: Estimator, settings: Settings) -> list[str]:
    empty = estimator.empty(settings)
    longest, notes = estimator.longest(settings), []
    if longest is not None and settings.seq > longest:
        notes.append(f"the model has places for {longest:,} tokens, fewer than seq={settings.seq:,}")
    if settings.checkpointing and not empty.checkpoints:
        notes.append("the model doesn't offer to recompute activations: planned without checkpointing")
    if settings.chunked_loss and not estimator.can_chunk(settings):
        notes.append("the model has no head whose loss could be chunked: planned with the whole")
    if estimator(settings).assumed:
        notes.append("the model's forward picks places by value: planned as if it picked all, so this is the most")
    if (method := stored_by(estimator.model)) is not None:
        notes.append(f"stored by {method}: planned as if it came in 16 bits, its linear layers in {settings.storage}")
    plan = empty.model.plan
    return notes + [str(part) for part in (plan.left_out if plan else ())]
