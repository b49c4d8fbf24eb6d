"""Adapters that are chosen when an engine has already taken in those that train.

DDP reduces the gradients of what trained when it was made, and DeepSpeed shares out the optimizer of that. Others that
are chosen afterwards would drift apart from process to process, or stay as they are, both in silence; so the next
forward refuses.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import AdapterError
from ..model import LoraModel


def keep_to_chosen_(parallel: nn.Module, lora: LoraModel, engine: str) -> None:
    """Have ``parallel``, which an engine made of ``lora`` now, refuse to compute once other parameters train.

    Args:
        engine: ``prepare``'s name of it.
    """
    known = {id(parameter) for parameter in lora.parameters() if parameter.requires_grad}

    def check(module: nn.Module, args: Any) -> None:
        if lost := [n for n, p in lora.named_parameters() if p.requires_grad and id(p) not in known]:
            raise AdapterError(
                f"{lost[0]}: expected the parameters to train that trained when {type(parallel).__name__} was made, "
                f"found {len(lost)} others, which it doesn't know; choose adapters first (set_adapter), then call "
                f"prepare(lora, {engine!r}) again"
            )

    parallel.register_forward_pre_hook(check)
