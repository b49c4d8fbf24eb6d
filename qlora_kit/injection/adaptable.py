"""Which modules an adapter can be put on, and why it can't be put on others of such types."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..codecs import find_codec
from ..codecs.registry import registered_codec
from ..layers import LinearAdapter, find_layer_family
from ..layers.sharded.megatron.parts import FusedPart
from ..naming import Tree, base_of
from .read_past import ReadPast


def adaptable(module: nn.Module) -> bool:
    """Whether ``module``, or what it stands for, has a codec that holds its matrix, and a layer family."""
    base = base_of(module)
    return find_codec(base) is not None and find_layer_family(base) is not None


def is_linear(module: nn.Module) -> bool:
    """Whether ``module``'s type is a linear layer's, however its weight is stored and whatever its codec says of it."""
    return issubclass(find_layer_family(base_of(module)) or nn.Module, LinearAdapter)


def refused(tree: Tree) -> dict[str, str]:
    """Linear layers that an adapter can't be put on, by every path, with the reason: "all-linear" and default targets
    leave them out."""
    return tree.once(_refused)


def _refused(tree: Tree) -> dict[str, str]:
    return {path: reason for ask in reversed(_ASKED) for path, reason in ask(tree).items()}


def _by_codec(tree: Tree) -> dict[str, str]:
    """Those whose codec says that what they keep as a weight isn't the matrix that they multiply by, or that they give
    something else than the product."""
    found = {}
    for path, module in tree.modules.items():
        base = base_of(module)
        if is_linear(base):
            codec = registered_codec(base)
            reason = "no codec reads its weight" if codec is None else codec.reason_against(base)
            if reason is not None:
                found[path] = reason
    return found


def _read_past(tree: Tree) -> dict[str, str]:
    """Those whose weight the model reads instead of calling them."""
    found = ReadPast(tree).left_out()
    return {path: reason for path, reason in found.items() if is_linear(tree.modules[path])}


def _parts_of_fused(tree: Tree) -> dict[str, str]:
    """Rows of fused linears, which are adapted as wholes unless parts are named."""
    parts = (path for path, module in tree.modules.items() if isinstance(base_of(module), FusedPart))
    return {path: f"it is a part of {path.rpartition('.')[0]}" for path in parts}


# Each is asked for paths and reasons; of several reasons for one path the first one's is given.
_ASKED: tuple[Callable[[Tree], Mapping[str, str]], ...] = (_by_codec, _read_past, _parts_of_fused)
