"""The repeated parts of a model, such as a transformer's layers, found by its structure.

Engines that keep parameters in pieces gather one part of the model at a time; too small a part costs a message each,
and the whole model in one part saves nothing. What models repeat, and keep in a ``ModuleList``, is the right size.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..naming import StandIn


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The members of the outermost ``ModuleList``s of ``model`` that hold parameters and are there in twos at least, in
    the order of the model; each once, and none inside another. Empty where the model repeats nothing.

    What an adapter layer or a trained copy stands for is no block of its own.
    """
    return list({id(block): block for block in _blocks(model)}.values())


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module._modules.values():
        if child is None or isinstance(child, StandIn):
            continue
        members = [m for m in child._modules.values() if m is not None] if isinstance(child, nn.ModuleList) else []
        held = [member for member in members if any(True for _ in member.parameters())]
        if len(held) > 1:
            yield from held
        else:
            yield from _blocks(child)
