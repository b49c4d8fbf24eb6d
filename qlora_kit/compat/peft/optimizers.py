"""PEFT's optimizers for LoRA's factors, by its names and arguments."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ...errors import ConfigError
from ...training.optimizers import lora_fa_, lora_plus
from ..foreign import foreign

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """``qlora_kit.training.optimizers.lora_plus``, with PEFT's ``loraplus_weight_decay`` (0.0) and
    ``loraplus_lr_embedding`` (1e-6) among ``kwargs``; the others are ``optimizer_cls``'s."""
    decay, lr_embedding = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    settings = {"ratio": loraplus_lr_ratio, "weight_decay": decay, "lr_embedding": lr_embedding}
    return lora_plus(model, optimizer_cls, lr=lr, **settings, **kwargs)


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """``qlora_kit.training.optimizers.lora_fa_`` with AdamW and PEFT's epsilon of 1e-6, which torch's AdamW adds
    after the bias correction and PEFT's before it.

    Each layer's own scaling counts, whatever its rank and alpha, so ``r`` and ``lora_alpha`` say nothing new;
    ``use_rslora``, which PEFT is about to remove, has to be what the adapters were made with.

    Raises:
        ConfigError: it is something else.
    """
    if use_rslora is not None:
        configs: dict[str, Any] = getattr(model, "peft_config", {})
        active: list[str] = list(getattr(model, "active_adapters", configs))
        other = [name for name in active if name in configs and bool(configs[name].use_rslora) is not use_rslora]
        if other:
            raise ConfigError(
                f"use_rslora: expected what the active adapters were made with, found {use_rslora} and others at "
                f"{other}; leave it out"
            )
        warnings.warn("use_rslora is read from the adapters' configurations; leave it out", FutureWarning, stacklevel=2)
    return lora_fa_(model, "adamw", lr=lr, weight_decay=weight_decay, eps=1e-6)


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
