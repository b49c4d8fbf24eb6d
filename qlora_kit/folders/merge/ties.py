"""Tied parameters under a merge: what stays one tensor, and what has to become several.

What is tied and stays equal stays as it is stored. Where adapters make tied parameters differ (a branch on one of them,
or a trained copy of one), the adapter's model computed with both values, so both are written, each from the one tensor
that is stored, and the output's config.json says ``tie_word_embeddings: false``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...checkpoints.stored_model import StoredModel, widened
from ...errors import MergeError
from .changes import Change


def settle(
    base: StoredModel, group: list[str], changes: dict[str, Change], sources: dict[str, str], *, dense: bool
) -> bool:
    """Decide whether the parameters of ``group`` stay tied; False if they don't.

    ``dense`` says that all of them are stored alike: adapters that are the same on all then leave them one.

    ``changes`` and ``sources`` (stored names, by those in the model) then say what each name of the output becomes: one
    that stays tied and isn't stored is in neither.

    Raises:
        MergeError: an adapter holds two different tensors for one parameter, or the model can't be untied.
    """
    stored = [name for name in group if name in sources]
    if not stored or (len(stored) > 1 and not _equal(base, [sources[name] for name in stored])):
        return True  # nothing is there, or several that differ, which transformers loads apart as they are
    _share(group, changes)
    found = [changes.get(name, Change()) for name in group]
    copies = [change.value for change in found if change.kind == "copy" and change.value is not None]
    alike = len(copies) == len(group) and all(torch.equal(copies[0], copy) for copy in copies[1:])
    branched = any(change.branches for change in found)
    if (not branched or (dense and _branches_alike(found))) and (alike or not copies):
        for name in group:
            if name not in sources:
                changes.pop(name, None)
        return True
    if getattr(base.model.config, "is_encoder_decoder", False):
        raise MergeError(
            f"{group[0]}: expected an adapter that leaves the tied {group} alone, found one that changes them apart; "
            "models with an encoder and a decoder can't be untied by their config, so take them out of its targets"
        )
    for name in group:
        sources.setdefault(name, sources[stored[0]])
    return False


def _branches_alike(changes: list[Change]) -> bool:
    """Whether the same is added to all: one pair of factors for an embedding and, transposed, a linear layer."""
    first, *others = changes
    return all(
        len(other.branches) == len(first.branches)
        and all(
            scale == own[2] and any(_equal_factors((A, B), pair) for pair in (own[:2], (own[1].T, own[0].T)))
            for (A, B, scale), own in zip(other.branches, first.branches, strict=True)
        )
        for other in others
    )


def _equal_factors(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def part(group: list[str], changes: dict[str, Change], sources: dict[str, str]) -> None:
    """Write every name of a group that stays equal, since the config that tied it is switched off for another."""
    stored = [name for name in group if name in sources]
    for name in group if stored else ():
        if name not in sources:
            sources[name] = sources[stored[0]]
            if stored[0] in changes:
                changes[name] = changes[stored[0]]


def _share(group: list[str], changes: dict[str, Change]) -> None:
    """Give every name of ``group`` the tensor that an adapter stored of the one parameter they are, if it did."""
    shared = [changes[name] for name in group if name in changes and changes[name].kind in ("bias", "table")]
    if not shared:
        return
    first = shared[0]
    if any(not torch.equal(_value(first), _value(other)) for other in shared[1:]):
        raise MergeError(
            f"{group[0]}: expected one tensor for the tied {group}, found different ones in {first.owner}; save the "
            "adapter without them (save_embedding_layers=False), or untie the base first"
        )
    for name in group:
        change = changes.setdefault(name, Change())
        if change.value is None:
            change.value, change.kind, change.owner = first.value, first.kind, first.owner


def _equal(base: StoredModel, stored: list[str]) -> bool:
    first, *others = (base.reader.tensor(name) for name in stored)
    return all(first.dtype == other.dtype and torch.equal(widened(first), widened(other)) for other in others)


def _value(change: Change) -> Tensor:
    assert change.value is not None
    return change.value
