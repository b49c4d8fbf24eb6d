"""Tied weights after a merge in memory: one again where the adapters had them as one, else said to be two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..injection.adapted import Adapted
from ..injection.engine import Injection
from ..injection.ties import tied_tables
from ..naming import Tree, base_of, module_at


def tied_by_adapters(adapted: Adapted, names: Iterable[str]) -> dict[str, str]:
    """Modules that all of the adapters ``names`` that change them change as one with another, and the path of that."""
    tree, names = adapted.tree(), list(names)
    parts: dict[str, Any] = {**adapted.layers(tree), **adapted.saved_modules(tree)}
    held = {path: [name for name in names if name in part.adapter_names()] for path, part in parts.items()}
    found: dict[str, str] = {}
    for path, part in parts.items():
        sources = {part.tied_to.get(name, "") for name in held[path]}
        if len(sources) == 1 and (source := sources.pop()) and held.get(source) == held[path]:
            found[path] = source
    return found


def check_can_be_parted(adapted: Adapted, names: Iterable[str]) -> None:
    """Refuse a merge that changes the table which others are tied to, where several of them stay one.

    transformers stores these under one of their names, and on loading ties the rest to the changed table.

    Raises:
        MergeError: names the modules.
    """
    tree, names = adapted.tree(), set(names)
    parts: dict[str, Any] = {**adapted.layers(tree), **adapted.saved_modules(tree)}
    changed = {path for path, part in parts.items() if names & set(part.adapter_names())}
    source, *others = tied_tables(tree) or [""]
    left = [path for path in others if path not in changed]
    if source in changed and len(left) > 1:
        raise MergeError(
            f"{source}: expected an adapter that leaves the tied {[source, *others]} alone, or is on all of them, "
            f"found one that parts it from {left}, which can't be stored so; pass ensure_weight_tying=True, or "
            "take it out of the adapter's targets"
        )


def tie_again_(model: nn.Module, tied: Mapping[str, str], undo: Injection) -> None:
    """Let the modules in ``tied`` have the weight of their source, where both are stored alike."""
    for path, source in tied.items():
        module, weight = base_of(module_at(model, path)), base_of(module_at(model, source))._parameters.get("weight")
        own = module._parameters.get("weight")
        if own is None or weight is None or (own.shape, own.dtype) != (weight.shape, weight.dtype):
            continue  # one of them has been quantized, and they can't be one any more
        undo.on_undo(partial(setattr, module, "weight", own))
        module.weight = weight


def declare_untied_(model: nn.Module, undo: Injection) -> None:
    """Make the config say that tables aren't tied where it says they are and the merge has left two different ones.

    The one flag is about all pairs of a model (an encoder's and a decoder's tables, BERT's biases), and where it is
    false what is one tensor still would be stored under one of its names and looked for under both. So it stays while
    any pair is tied; two tensors that differ are then stored, and loaded, under a name each.
    """
    config, tied = getattr(model, "config", None), getattr(model, "get_expanded_tied_weights_keys", None)
    if config is None or tied is None:
        return
    modules = Tree(model).modules.items()
    held = {f"{path}.{name}": tensor for path, m in modules for name, tensor in base_of(m)._parameters.items()}
    pairs = [(held.get(name), held.get(source)) for name, source in tied(all_submodels=True).items()]
    found = [(one, other) for one, other in pairs if one is not None and other is not None]
    if any(one is other for one, other in found) or not any(_differ(one, other) for one, other in found):
        return
    for part in (config, *vars(config).values()):
        if getattr(part, "tie_word_embeddings", None):
            undo.on_undo(partial(setattr, part, "tie_word_embeddings", part.tie_word_embeddings))
            part.tie_word_embeddings = False


def _differ(one: Tensor, other: Tensor) -> bool:
    if one.is_meta or other.is_meta:
        return False
    return one.dtype != other.dtype or one.device != other.device or not torch.equal(one, other)
