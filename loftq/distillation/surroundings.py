"""What a caller may have switched on around it, set aside while adapters learn: it is about another computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside the block gradients can be taken, and parameters are read as they are.

    Inference mode makes tensors that none can be taken through. Autocast stays what it is, but for its cache: it keeps
    its copies of parameters until the caller's block ends, as they were at first, and without a gradient where the
    first forward took none.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False):
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        torch.clear_autocast_cache()


@contextmanager
def alone(model: nn.Module, factors: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside the block the factors, and nothing else of ``model``, get gradients; they lose what they had till then."""
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    own = set(factors)
    try:
        for parameter in trained:
            parameter.requires_grad_(parameter in own)
        for parameter in own:
            parameter.grad = None
        yield
    finally:
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
