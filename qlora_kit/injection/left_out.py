"""What a choice of "all linear layers", or of the usual ones, leaves out, and how much of the model that is.

Whoever says ``target_modules="all-linear"`` means the whole model. Most of a mixture's weights are in no linear layer,
though: its experts lie in parameters of three dimensions, ``(experts, out, in)``. Others are in linear layers that an
adapter can't be put on, or in a head. They are found by structure, whatever the architecture calls them, and the plan
names each kind once, however many layers it repeats over.

A warning is for what the user can't have meant. The head is meant to be left out, and what is below a tenth of the
model costs little: routers, and the gates and projections of a recurrence (one in fifty of Mamba's weights). Experts
are half of a small mixture and nine tenths of a large one.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import nn

from ..codecs.registry import registered_codec
from ..errors import LeftOutWarning
from ..layers import find_layer_family
from ..layers.sharded.sharding import whole_shape
from ..naming import Tree, base_of
from .adaptable import is_linear, refused
from .heads import new_head, output_table
from .stacks import stacks_in

#: The share of a model's parameters from which on a warning names what is left out.
LARGE = 0.1
# Single matrices outside of linear layers are named from this share on: a recurrence has many with next to nothing in.
_WORTH_NAMING = 0.01
_MATRIX = 2


@dataclass(frozen=True)
class LeftOut:
    """Parts of one kind that get no adapter.

    Attributes:
        paths: of the modules, or of the parameters where a module of another kind holds matrices.
        module_type: the type of the module.
        reason: why they are left out.
        parameters: how many weights they hold; a packed one counts as the weights in it.
        share: of all of the model's.
        expected: whether that is what the choice means, as with the output head.
    """

    paths: tuple[str, ...]
    module_type: str
    reason: str
    parameters: int
    share: float
    expected: bool = False

    @property
    def pattern(self) -> str:
        """One name for all paths: a star where they have different numbers."""
        return _pattern(self.paths[0]) if len(self.paths) > 1 else self.paths[0]

    def __str__(self) -> str:
        count = f"{len(self.paths)} x " if len(self.paths) > 1 else ""
        size = f"{self.parameters:,} parameters, {self.share:.1%}"
        return f"{self.pattern}  left out: {count}{self.module_type}, {size}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "pattern": self.pattern}


@dataclass(frozen=True)
class _Part:
    path: str
    module_type: str
    reason: str
    parameters: int
    expected: bool = False


def find_left_out(tree: Tree, chosen: Collection[str], aside: Sequence[str]) -> tuple[LeftOut, ...]:
    """Linear layers and other matrices of the model that get no adapter, alike ones together.

    Args:
        chosen: paths of the modules that get one.
        aside: modules that the user speaks of otherwise, with all inside them: those trained whole, and exclusions.
    """
    sizes = _sizes(tree)
    total = sum(size for own in sizes.values() for size in own.values()) or 1
    within = tuple(f"{path}." for path in aside) or ("\0",)
    chosen = set(chosen)
    groups: dict[tuple[str, str, str], list[_Part]] = {}
    for part in _parts(tree, sizes, total):
        if part.path not in chosen and not f"{part.path}.".startswith(within):
            groups.setdefault((_pattern(part.path), part.module_type, part.reason), []).append(part)
    return tuple(_together(parts, total) for parts in groups.values())


def warn_of_left_out(choice: str, left_out: Sequence[LeftOut]) -> None:
    """Say with a ``LeftOutWarning`` what of the model ``choice`` leaves out, if it's much and wasn't to be expected."""
    parts = sorted((part for part in left_out if not part.expected), key=lambda part: -part.share)
    share = sum(part.share for part in parts)
    if share >= LARGE:
        named = "; ".join(f"{part.pattern} ({part.share:.1%}, {part.module_type}: {part.reason})" for part in parts[:4])
        more = f"; and {len(parts) - 4} kinds more, see the plan" if len(parts) > 4 else ""
        warnings.warn(
            f"{choice} leaves out {share:.0%} of the model's parameters, which stay as they are: {named}{more}. Where "
            "that is meant, name their modules in exclude_modules",
            LeftOutWarning,
            stacklevel=2,
        )


def _parts(tree: Tree, sizes: dict[str, dict[str, int]], total: int) -> Iterator[_Part]:
    heads, words, reasons = new_head(tree), output_table(tree), refused(tree)
    why = {path: "a head beside the backbone, to be trained whole (modules_to_save)" for path in heads}
    whole = {**reasons, **dict.fromkeys(words, "the output head"), **why}
    layers = {path for path in sizes if find_layer_family(base_of(tree.modules[path])) is not None}
    nested = [path for path in layers if base_of(tree.modules[path])._modules]  # what a layer's weight is computed from
    within = tuple(f"{path}." for path in (*whole, *nested)) or ("\0",)
    for path, own in sizes.items():
        module = tree.modules[path]
        if path.startswith(within):
            continue
        if path in whole:
            inside = [name for name in sizes if f"{name}.".startswith(f"{path}.")]
            if any(is_linear(tree.modules[name]) for name in inside):
                size = sum(sum(sizes[name].values()) for name in inside)
                yield _Part(path, _type(module), whole[path], size, expected=path in heads or path in words)
        elif path not in layers:
            yield from _matrices(path, module, own, total)


def _matrices(path: str, module: nn.Module, own: dict[str, int], total: int) -> Iterator[_Part]:
    """The matrices and stacks of them that a module of no layer family holds in its own parameters."""
    stacks, base = stacks_in(module), base_of(module)
    for name, size in own.items():
        dims = [n for n in base._parameters[name].shape if n > 1]  # type: ignore[union-attr]
        if name in stacks:
            reason = f"a stack of {stacks[name]} matrices, for which there is no adapter layer"
        elif len(dims) == _MATRIX and size >= _WORTH_NAMING * total:
            reason = "a matrix in a module for which there is no adapter layer"
        else:
            continue
        yield _Part(f"{path}.{name}".lstrip("."), _type(module), reason, size)


def _sizes(tree: Tree) -> dict[str, dict[str, int]]:
    """How many weights each module's own parameters hold, by its first path and their names; shared ones count once."""
    seen: set[int] = set()
    found: dict[str, dict[str, int]] = {}
    for path, module in tree.firsts():
        base = base_of(module)
        found[path] = {}
        for name, parameter in base._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                codec = registered_codec(base) if name == "weight" else None
                found[path][name] = parameter.numel() if codec is None else prod(whole_shape(base, codec.shape(base)))
    return found


def _together(parts: Sequence[_Part], total: int) -> LeftOut:
    first, size = parts[0], sum(part.parameters for part in parts)
    paths = tuple(part.path for part in parts)
    return LeftOut(paths, first.module_type, first.reason, size, size / total, first.expected)


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _type(module: nn.Module) -> str:
    return type(base_of(module)).__name__
