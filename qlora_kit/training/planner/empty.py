"""The model of a plan, on the meta device: quantized, prepared and with adapters, by the calls that a user makes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from ...checkpoints.model_folder import empty_model
from ...compat.neighbours.quieted import quieted
from ...config.lora import LoraConfig
from ...model.lora_model import LoraModel, apply_lora
from ..preparation.kbit import (
    NOT_OFFERED,
    Preparation,
    checkpoint_activations_,
    memory_bill,
    prepare_model_for_kbit_training,
)
from ..preparation.quantize import quantize_
from .live import LiveBytes
from .settings import Settings


@dataclass(frozen=True)
class Empty:
    """A model without values.

    Attributes:
        model: with adapters, ready to be trained.
        bytes: of parameters and buffers, by kind.
        preparing: the most bytes that there were while it was prepared.
        checkpoints: whether it can recompute activations.
    """

    model: LoraModel
    bytes: dict[str, int]
    preparing: int
    checkpoints: bool

    @property
    def trained(self) -> list[Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def make_empty(model: str | os.PathLike[str], settings: Settings) -> Empty:
    """``model`` as ``settings`` train it, whatever the sequence, batch and optimizer.

    Raises:
        StorageError: see ``checkpoints.model_folder.empty_model``.
        TargetError: the targets select nothing.
    """
    with quiet():
        base = empty_model(model, settings.compute_dtype, "eager" if settings.attention == "eager" else None)
        if settings.bits < 16:
            quantize_(
                base,
                settings.bits,
                quant_type=settings.quant_type,
                blocksize=settings.blocksize,
                double_quant=settings.double_quant,
            )
        before = memory_bill(base).total
        with LiveBytes((*base.parameters(), *base.buffers())) as live:
            offered = _prepare_(base, settings)
        targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.rank,
            target_modules=targets,
            lora_dropout=settings.dropout,
            merge_aware=settings.merge_aware,
        )
        lora = apply_lora(base, config, adapter_dtype=getattr(torch, settings.adapter_dtype)).train()
        peak = before + max((sum(moment) for moment in live.moments), default=0)
        return Empty(lora, memory_bill(lora).bytes, peak, offered != NOT_OFFERED)


def _prepare_(base: torch.nn.Module, settings: Settings) -> str:
    """What comes before adapters: k-bit preparation, or the recomputing of activations alone."""
    if settings.bits < 16:
        prepare_model_for_kbit_training(base, use_gradient_checkpointing=settings.checkpointing)
        return base.memory_bill.activation_checkpointing  # type: ignore[union-attr, return-value]
    return checkpoint_activations_(base, {}, Preparation(frozenset())) if settings.checkpointing else "off"


def quiet() -> AbstractContextManager[None]:
    """Advice about a model that is never run is kept to itself."""
    return quieted("bitsandbytes", "transformers")
