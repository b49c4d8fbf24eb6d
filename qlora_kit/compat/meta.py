"""Factors without memory: what ``low_cpu_mem_usage=True`` leaves for a later load to fill.

The parameters stay the same objects on the way there and back, so that whoever holds one (an optimizer, a hook) still
does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..model.lora_model import LoraModel


def to_meta_(model: LoraModel, adapter_name: str) -> None:
    """Give the memory of ``adapter_name``'s factors back."""
    for layer in model.adapter_layers().values():
        if adapter_name in layer.r:
            for parameter in layer.adapter_tensors(adapter_name).values():
                _put_(parameter, torch.empty_like(parameter, device="meta"))


def with_memory_(model: LoraModel, adapter_name: str) -> list[nn.Parameter]:
    """Give ``adapter_name``'s factors memory, of any contents, where their bases lie; returns those that had none."""
    filled = []
    for layer in model.adapter_layers().values():
        if adapter_name in layer.r:
            for parameter in layer.adapter_tensors(adapter_name).values():
                if parameter.is_meta:
                    _put_(parameter, torch.empty_like(parameter, device=layer.codec.device(layer.base_layer)))
                    filled.append(parameter)
    return filled


def without_memory_(parameters: list[nn.Parameter]) -> None:
    """Undo ``with_memory_``."""
    for parameter in parameters:
        _put_(parameter, torch.empty_like(parameter, device="meta"))


def _put_(parameter: nn.Parameter, values: Tensor) -> None:
    torch.utils.swap_tensors(parameter, nn.Parameter(values.detach(), requires_grad=parameter.requires_grad))
