"""Layers of a stack that the usual targets don't reach, and what stands in their place there.

The usual targets are names of attention projections. A hybrid has attention in some of its layers and a recurrence, a
convolution or a network of experts in the others: one layer in four, or eight, would be trained, and nothing would say
so. No list of architectures settles this, since new ones appear by the month, but their structure does. A stack is the
first numbered list on the way to a module. Where the targets reach some of its layers, a *bare* layer gets branches on
the linear layers of those of its parts that no reached layer has: none of that name, such as Jamba's ``mamba`` beside
the ``feed_forward`` of all layers; else none of that name and type, such as Nemotron-H's ``mixer``; else on all of its
linear layers. A stack that isn't reached at all, such as a vision tower beside a language model, stays as it is, and so
does one all of whose layers are reached: there the targets are PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from ..naming import Tree, base_of


def of_bare_layers(tree: Tree, chosen: Collection[str], linears: Iterable[str]) -> list[str]:
    """Those of ``linears`` to be adapted too, so that ``chosen`` reaches every layer of the stacks that it reaches.

    A layer that has no linear layer of its own stays bare.
    """
    found: list[str] = []
    linears = list(linears)
    reached = {_layer(tree, path) for path in chosen} - {None}
    for stack in sorted({layer.rpartition(".")[0] for layer in reached if layer}):
        layers = [_join(stack, name) for name in tree.modules[stack]._modules]
        own = {layer: [path for path in linears if path.startswith(f"{layer}.")] for layer in layers}
        usual = {part for layer in layers if layer in reached for part in _parts(tree, layer)}
        found += [
            path for layer in layers if layer not in reached for path in _in_place(tree, layer, own[layer], usual)
        ]
    return found


def _in_place(tree: Tree, layer: str, linears: list[str], usual: set[tuple[str, type]]) -> list[str]:
    """Those of a bare layer's ``linears`` that lie in parts other than the ``usual`` ones, or all."""
    parts, names = _parts(tree, layer), {name for name, _ in usual}
    for others in ({name for name, _ in parts} - names, {name for name, _ in parts - usual}):
        within = tuple(f"{layer}.{name}." for name in others)
        if within and (found := [path for path in linears if f"{path}.".startswith(within)]):
            return found
    return linears


def _layer(tree: Tree, path: str) -> str | None:
    """The layer of the first list of modules on the way to ``path``, if there is one."""
    for number in re.finditer(r"(?<![^.])\d+(?=\.)", path):
        stack, layer = path[: number.start()].rstrip("."), path[: number.end()]
        if isinstance(base_of(tree.modules[stack]), (nn.ModuleList, nn.Sequential)):
            return layer
    return None


def _parts(tree: Tree, layer: str) -> set[tuple[str, type]]:
    """The parts of a layer, by name and type."""
    children = tree.modules[layer]._modules.items()
    return {(name, type(base_of(child))) for name, child in children if child is not None}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
