"""Modules that hold one weight: the tables of words at both ends of most small language models.

An adapter on one of them is that one's alone, as a trained copy of one is: the model computes with the other as before,
and a merge takes them apart. With ``ensure_weight_tying`` an adapter that is on any of them is on all: one pair of
factors, or one trained copy, which the input embeddings hold and the others share. Both are PEFT's behaviour; whether
weights are tied is asked of the weights here, and of the config and of module names there.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import nn

from ..errors import TargetError
from ..naming import Tree, base_of, unwrapped


def end_tables(model: nn.Module) -> list[nn.Module | None]:
    """The modules of words at both ends of ``model``, as transformers tells them: embedding and head."""
    found: list[nn.Module | None] = []
    for end in ("input", "output"):
        try:
            table = getattr(unwrapped(model), f"get_{end}_embeddings", lambda: None)()
        except NotImplementedError:  # a model without any says so in this way
            table = None
        found.append(None if table is None else unwrapped(table))
    return found


def words_of(model: nn.Module) -> int | None:
    """Rows of the model's input embeddings; None where they aren't a table of words."""
    table = end_tables(model)[0]
    base = None if table is None else base_of(table)
    return base.num_embeddings if isinstance(base, nn.Embedding) else None  # a sharded weight has no rows to count


def tied_tables(tree: Tree) -> list[str]:
    """Paths of the input embeddings and of the other modules that hold their weight; empty where there is no other."""
    table = end_tables(tree.model)[0]
    weight = None if table is None else base_of(table)._parameters.get("weight")
    if table is None or weight is None:
        return []
    source = tree.paths_of(base_of(table))[0]
    others = [
        path
        for path, module in tree.firsts()
        if base_of(module) is not base_of(table) and base_of(module)._parameters.get("weight") is weight
    ]
    return [source, *others] if others else []


def ties_among(tree: Tree, chosen: Iterable[str]) -> dict[str, str]:
    """Which modules share the adapter of which, if tied weights are to stay tied: all that hold the weight of the input
    embeddings, if one of ``chosen`` does."""
    group = tied_tables(tree)
    return dict.fromkeys(group[1:], group[0]) if group and set(group) & set(chosen) else {}


def sharing(tree: Tree, paths: Iterable[str], *, but_tables: bool = False) -> dict[str, str]:
    """Those of ``paths`` whose module holds a parameter that another module holds too, and the path of that; with
    ``but_tables`` only a matrix that is no embedding's."""
    owners, tables = tree.once(_owners)
    found: dict[str, str] = {}
    for path in paths:
        module = base_of(tree.modules[path])
        parts = [*module.modules()] if module._modules else [module]  # most have none inside
        inside = {id(part) for part in parts}  # wherever else it stands
        for parameter in (p for part in parts for p in part._parameters.values() if p is not None):
            if but_tables and (parameter.dim() < 2 or id(parameter) in tables):
                continue
            others = [p for i, p in owners.get(id(parameter), {}).items() if i not in inside]
            if others:
                found.setdefault(path, others[0])
    return found


def _owners(tree: Tree) -> tuple[dict[int, dict[int, str]], set[int]]:
    """By the id of each parameter the modules that hold it, by theirs, and the path of each; and which are tables."""
    owners: dict[int, dict[int, str]] = {}
    tables: set[int] = set()
    for path, module in tree.modules.items():
        base = base_of(module)
        if isinstance(base, nn.Embedding):
            tables.add(id(base._parameters.get("weight")))
        for parameter in base._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {}).setdefault(id(base), path)
    return owners, tables


def refuse_tied(tree: Tree, paths: Iterable[str], *, but_tables: bool = False) -> None:
    """Refuse modules whose weight another module holds too, where it would be quantized or stored for one of them only.

    With ``but_tables`` tables of words pass: which of them are one is for the model's config to say, and can be
    changed, while layers that share a matrix (Zamba's) are one in any model of their class: a merge can't part them.

    Raises:
        TargetError: names both modules.
    """
    for path, other in sharing(tree, paths, but_tables=but_tables).items():
        raise TargetError(
            f"{path}: its weight is tied to {other}'s, and what is done to it here would break that module, or part "
            f"the two in silence; leave it out of the targets, or untie first: {path}.weight = "
            f"nn.Parameter({path}.weight.detach().clone()) and config.tie_word_embeddings = False"
        )


def warn_of_ties(tree: Tree, paths: Iterable[str], *, ensured: bool, ties: bool) -> None:
    """Say what a configuration's ``ensure_weight_tying`` means for the tied weights of its modules, where that may not
    be what was wanted.

    Args:
        paths: of all modules that are adapted or trained whole.
        ensured: what the configuration says. ties: whether any of the modules share an adapter by it.
    """
    if ensured and not ties:
        reason = "none of them is adapted or trained" if tied_tables(tree) else "the model has no tied tables of words"
        warnings.warn(f"ensure_weight_tying=True has no effect: {reason}", stacklevel=2)
    elif not ensured and (found := sharing(tree, paths)):
        path, other = next(iter(found.items()))
        warnings.warn(
            f"{path}: its weight is tied to {other}'s, and what the adapter learns is for {path} alone, so a merged "
            "model holds two different weights; pass ensure_weight_tying=True to train both as one",
            stacklevel=2,
        )
