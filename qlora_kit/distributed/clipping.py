"""Gradients clipped by the norm of all of them, where some are shared out to several processes and some are not.

``torch.nn.utils.clip_grad_norm_`` knows the norm of DTensors, which is that of all parts, and refuses to take them and
plain tensors together. A model under tensor parallelism has both as soon as one adapted layer isn't in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..codecs.shards.tensors import is_dtensor


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, for DTensors and plain tensors together; every process has to call it.

    Returns:
        The norm of all gradients before, the same plain tensor on every process.
    """
    held = [p for p in parameters if p.grad is not None]
    kinds = [[p for p in held if is_dtensor(p) is kind] for kind in (True, False)]
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None], norm_type) for kind in kinds if kind]
    plain = [norm.full_tensor() if is_dtensor(norm) else norm for norm in norms]  # type: ignore[attr-defined]
    total = torch.linalg.vector_norm(torch.stack(plain), norm_type) if plain else torch.tensor(0.0)
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, total)
    return total
