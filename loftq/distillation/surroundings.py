"""What a caller may have switched on around it, set aside while adapters learn: it is about another computation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
