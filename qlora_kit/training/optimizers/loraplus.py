"""LoRA+: B learns at a multiple of A's rate (Hayou, Ghosh and Yu, arXiv 2402.12354).

With one rate for both, features of wide models are learned as if only one of the factors were trained: for the product
to change in both at the order of one as the width n grows, A's rate has to go as 1/n and B's as 1. The ratio is the new
setting; the paper finds about 16 (2^4) good, and that A's rate then has to be about half of plain LoRA's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...config.checks import check_positive
from .named import made
from .roles import roles_of


def lora_plus_groups(
    model: nn.Module, *, lr: float, ratio: float = 16.0, weight_decay: float = 0.0, lr_embedding: float = 1e-6
) -> list[dict[str, Any]]:
    """Parameter groups for LoRA+, for any optimizer, as the paper's code divides them.

    A and other trained matrices learn at ``lr``, B at ``ratio * lr``, adapters on tables of words at
    ``lr_embedding``. Vectors (biases, norms) learn as B does and don't decay. Groups without parameters are left out;
    each has its "name".

    Raises:
        AdapterError: nothing is trained.
        ConfigError: a rate or ratio that isn't positive.
    """
    for field, value, default in (("lr", lr, 1e-4), ("ratio", ratio, 16.0), ("lr_embedding", lr_embedding, 1e-6)):
        check_positive(field, value, f"pass a number such as {field}={default:g}")
    roles = roles_of(model)
    groups = [
        {"name": "A", "params": [*roles.A, *roles.matrices], "lr": lr, "weight_decay": weight_decay},
        {"name": "tables", "params": roles.tables, "lr": lr_embedding, "weight_decay": weight_decay},
        {"name": "B", "params": roles.B, "lr": lr * ratio, "weight_decay": weight_decay},
        {"name": "vectors", "params": roles.vectors, "lr": lr * ratio, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def lora_plus(
    model: nn.Module,
    name: str | type[Optimizer] = "adamw",
    *,
    lr: float,
    ratio: float = 16.0,
    weight_decay: float = 0.0,
    lr_embedding: float = 1e-6,
    **settings: Any,
) -> Optimizer:
    """The optimizer ``name`` (as in ``optimizer``) of ``lora_plus_groups``; ``settings`` are its keyword arguments."""
    groups = lora_plus_groups(model, lr=lr, ratio=ratio, weight_decay=weight_decay, lr_embedding=lr_embedding)
    return made(name, model, groups, lr=lr, **settings)
