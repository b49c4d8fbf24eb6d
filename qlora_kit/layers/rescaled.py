"""Weights that a model multiplies for inference, and divides again for training, at the size that they are stored in.

RWKV halves the output layers of its later blocks in the first forward in eval mode, and remembers that it has. What it
does to the weight of an adapter layer is done to the branches that are in effect. Those that are made, switched on or
taken out of a merge later on would be that much too large beside it, and a file written then loads as another model. So
adapters change, and files are written, at full size; the next forward does its part anew.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..naming import StandIn


@torch.no_grad()
def at_full_size_(model: nn.Module) -> None:
    """Have every part of ``model`` whose weights are rescaled for inference undo that, exactly: by powers of two."""
    for module in _parts(model):
        rescale = getattr(type(module), "_rescale_layers", None)
        if rescale is None or not vars(module).get("layers_are_rescaled", False) or _quantized(module):
            continue
        training = module.training
        module.training = True  # of this module alone: which way to go is told by it
        try:
            rescale(module)
        finally:
            module.training = training


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of ``model``, adapter layers not entered: asked for at every change, of thousands of modules."""
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        if not isinstance(module, StandIn):
            waiting += [child for child in module._modules.values() if child is not None]


def _quantized(model: nn.Module) -> bool:
    """Whether the weights are codes, which transformers rescales on the way to inference only."""
    return any(not p.is_floating_point() or hasattr(p, "quant_state") for p in model.parameters())
