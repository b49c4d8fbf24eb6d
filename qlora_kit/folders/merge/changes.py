"""What stored adapters change in a stored model: branches to add and tensors to put in the place of others, by name.

An adapter's file holds low-rank factors and, beside them, whole tensors of four kinds, which a merge treats apart:

- "copy": of a module that the adapter trained whole (``modules_to_save``). It replaces that module's tensor and no
  other's, also where the base ties them: the adapter's model computed with both.
- "bias": one of the base's own biases, trained in place.
- "table": the base's own embedding or head, which PEFT stores along when it was resized or on request.
- "buffer": running statistics and the like, which training moved.

All but the first are the base's own tensor, so they count for every name that is tied to it. Every tensor of every
adapter finds its place here, or an error names it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_files.combined_config import check_apart, holder_of
from ...adapter_files.folder import PREFIX
from ...checkpoints.stored_model import StoredModel
from ...codecs import codec_for, registered_codec
from ...codecs.finite import all_finite
from ...errors import MergeError, StorageError, closest
from ...injection.stacks import why_no_branch
from ...injection.ties import end_tables
from ...naming import Tree
from ..stored_adapter import StoredAdapter, parameter_name


@dataclass
class Change:
    """Of one parameter of the model.

    Attributes:
        branches: A (rank, in) and B (out, rank) of each branch, and what their product is multiplied by.
        value: the tensor in the parameter's place, if there is one, of ``kind`` "copy", "bias", "table" or "buffer".
        owner: whose value it is.
    """

    branches: list[tuple[Tensor, Tensor, float]] = field(default_factory=list)
    value: Tensor | None = None
    kind: str = ""
    owner: str = ""

    def stacked(self) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), float32, whose product is the sum of the branches."""
        A = torch.cat([A.float() for A, _, _ in self.branches])
        return A, torch.cat([B.float() * scale for _, B, scale in self.branches], dim=1)


def changes_of(
    base: StoredModel, adapters: Mapping[str, StoredAdapter], weights: Mapping[str, float]
) -> dict[str, Change]:
    """What ``adapters`` (by folder) change, by the model's name of the parameter.

    Raises:
        MergeError: a value is NaN or infinite, two adapters replace one tensor, or one is to be weighted that can't be.
        StorageError: tensors without a place in the model, or of other shapes.
        AdapterError: one adapter has a branch in a module that another trained whole.
        UnsupportedModuleError: a branch in a module whose weight isn't its matrix.
    """
    check_apart(
        {name: one.config for name, one in adapters.items()}, {p for s in adapters.values() for p in s.branches}
    )
    changes: dict[str, Change] = {}
    for name, one in adapters.items():
        left = [
            *_add_branches(base, name, one, weights[name], changes),
            *_add_values(base, name, one, weights, changes),
        ]
        if left:
            near = closest(left[0].removeprefix(PREFIX), base.names.known)
            why = why_no_branch(Tree(base.model), [key.removeprefix(PREFIX) for key in left])
            raise StorageError(
                f"{name}: expected an adapter of {base.folder} ({type(base.model).__name__}), each tensor of which has "
                f"its place there, found {len(left)} that don't: {left[:5]} (closest in the model: {near}); "
                + (why or "pass the base model of this adapter, with the head that it was trained with")
            )
    return changes


def _add_branches(
    base: StoredModel, name: str, one: StoredAdapter, weight: float, changes: dict[str, Change]
) -> list[str]:
    """Take in the branches of one adapter; the keys that have no place."""
    left: list[str] = []
    for path, branch in one.branches.items():
        own = base.names.path_of(path)
        module = base.modules.get(own or "")
        if module is None or registered_codec(module) is None or f"{own}.weight" not in base.names.known:
            left += one.keys[path]
            continue
        expected = codec_for(module, path).shape(module)
        if (branch.B.shape[0], branch.A.shape[1]) != expected:
            raise StorageError(
                f"{name}: {path}: expected factors of a {expected} weight (out, in), found {tuple(branch.A.shape)} and "
                f"{tuple(branch.B.shape)}; the adapter belongs to another model"
            )
        if not all(all_finite(factor) for factor in (branch.A, branch.B)):
            raise MergeError(f"{path}: adapter {name} holds NaN or infinite values; train it again")
        change = changes.setdefault(base.names.known[f"{own}.weight"], Change())
        change.branches.append((branch.A, branch.B, weight * branch.scaling))
    return left


def _add_values(
    base: StoredModel, name: str, one: StoredAdapter, weights: Mapping[str, float], changes: dict[str, Change]
) -> list[str]:
    """Take in the whole tensors of one adapter; the keys that have no place."""
    left: list[str] = []
    for key, value in one.rest.items():
        place = base.names.name_of(parameter_name(key))
        kind = "" if place is None else _kind(base, place, parameter_name(key), one)
        if place is None or not kind:
            left.append(key)
            continue
        if tuple(value.shape) != base.shapes[place]:
            raise StorageError(
                f"{name}: {key}: expected shape {base.shapes[place]}, found {tuple(value.shape)}; resize the base's "
                "embeddings as they were in training and save it, or pass the base of this adapter"
            )
        if not all_finite(value):
            raise MergeError(f"{place}: adapter {name} holds NaN or infinite values; train it again")
        if kind not in ("table", "buffer") and weights[name] != 1:
            raise MergeError(
                f"{place}: expected weight 1 for an adapter that trained this tensor whole, found {weights[name]:g} "
                f"for {name}; leave its weight at 1, since there is no delta of it to weigh"
            )
        change = changes.setdefault(place, Change())
        if change.value is not None and not (
            kind == change.kind in ("table", "buffer") and torch.equal(change.value, value)
        ):
            raise MergeError(
                f"{place}: expected at most one adapter with its own tensor here, found {change.owner} and {name}; "
                "merge one of them"
            )
        change.value, change.kind, change.owner = value, kind, name
    return left


def _kind(base: StoredModel, place: str, name: str, one: StoredAdapter) -> str:
    if holder_of(name.rpartition(".")[0], one.config) is not None:
        return "copy"
    if one.config.bias != "none" and "bias" in name:
        return "bias"
    heads = end_tables(base.model)
    module = base.modules[place.rpartition(".")[0]]
    if place.rpartition(".")[2] in module._buffers and registered_codec(module) is None:
        return "buffer"
    if isinstance(module, nn.Embedding) or any(module is head for head in heads):
        return "table"
    return ""


def parts_of(folders: Sequence[Any], weights: Sequence[float] | None) -> dict[str, float]:
    """The weight of each adapter, by its folder's name.

    Raises:
        MergeError: no adapter, one that is named twice, or weights that don't fit.
    """
    names = [str(Path(folder)) for folder in folders]
    if not names:
        raise MergeError("nothing to merge: expected at least one adapter, found none; name one")
    if len(set(names)) != len(names):
        raise MergeError(
            f"adapters {names}: one stands twice, so its delta would be added twice; give it a weight instead"
        )
    given = [1.0] * len(names) if weights is None else list(weights)
    if len(given) != len(names):
        raise MergeError(
            f"weights: expected one for each of the {len(names)} adapters, found {given}; pass them in the same order"
        )
    for name, weight in zip(names, given, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or not weight:
            raise MergeError(
                f"weight of {name}: expected a finite number other than 0, found {weight!r}; pass 0.5, say"
            )
    return {name: float(weight) for name, weight in zip(names, given, strict=True)}
