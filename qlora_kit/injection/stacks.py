"""Stacks of matrices: a mixture's experts in one parameter of three dimensions, for which there is no layer family.

transformers stores such experts one by one and stacks them when it loads a checkpoint. Adapters that were trained while
they were modules of their own have a branch for every one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod

from torch import nn

from ..layers import find_layer_family
from ..naming import Tree, base_of

_STACKED = 3
# Names of experts' parts before they were stacked, by that of the stack: PEFT and transformers (2026) take a target of
# such a name for the stack in a model that has one, whatever module has the name now.
_BEFORE = {"gate_up_proj": ("gate_proj", "up_proj", "w1", "w3"), "down_proj": ("down_proj", "w2")}


def stacks_in(module: nn.Module) -> dict[str, int]:
    """How many matrices each of a module's own parameters of three and more dimensions holds, unless there is a layer
    family for its type, such as a convolution's; a dimension of one counts for nothing."""
    base = base_of(module)
    shapes = {name: [n for n in p.shape if n > 1] for name, p in base._parameters.items() if p is not None}
    found = {name: prod(dims[:-2]) for name, dims in shapes.items() if len(dims) >= _STACKED}
    return found if found and find_layer_family(base) is None else {}


def why_no_branch(tree: Tree, paths: Iterable[str]) -> str:
    """What to say of branches at ``paths``, for which the model has no module, where they are of experts that it keeps
    in stacks; empty where they aren't."""
    holders: dict[str, str] = {}
    for path in paths:
        for holder in re.findall(r"(?<![^.])([^.]+)\.\d+(?=\.)", path):
            holders.setdefault(holder, path.partition(".lora_")[0])
    for holder, path in holders.items():
        for found in tree.names.of(holder):
            if stacks := stacks_in(tree.modules[found]):
                return (
                    f"{path} is a branch of one expert, but {found} keeps its experts in stacks ({', '.join(stacks)}), "
                    "which no adapter can be put on yet; use an adapter without branches on experts, or a release of "
                    "transformers that keeps them as modules of their own"
                )
    return ""


def taken_for_experts(tree: Tree, paths: Iterable[str]) -> list[str]:
    """Those of the adapted ``paths`` that other libraries take for experts' parts, by their names: linear layers beside
    experts that the model keeps in stacks."""
    stacks = {name for module in tree.modules.values() for name in stacks_in(module)}
    names = {before for stack in stacks for before in _BEFORE.get(stack, ())}
    return [path for path in paths if path.rpartition(".")[2] in names]
