"""What is done to a bare model with layers injected: PEFT's functions of the methods that a wrapper has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...errors import AdapterError
from ...layers import AdapterLayer
from ..injecting import inject_adapter_in_model, manager_of
from ..model import PeftModel
from ..state import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "cast_adapter_dtype",
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(
    model: nn.Module,
    adapter_name: str | Sequence[str],
    inference_mode: bool = False,
    layer_cls: type[nn.Module] = AdapterLayer,
) -> None:
    """Make one or several adapters the active ones, and (unless ``inference_mode``) the trainable ones."""
    _check_class(layer_cls)
    manager_of(model).set_adapter(adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train or freeze adapters without changing which ones are active."""
    manager_of(model).set_requires_grad(adapter_names, requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str = PeftModel.prefix, layer_cls: type[nn.Module] = AdapterLayer
) -> list[str] | None:
    """Forget an adapter; returns the names of those that are active then, None for none.

    Raises:
        AdapterError: no adapter of this name; or ``prefix``, of a method's parameters, isn't LoRA's "lora_".
    """
    _check_class(layer_cls)
    if prefix != PeftModel.prefix:
        raise AdapterError(f"prefix: expected {PeftModel.prefix!r}, that of LoRA, found {prefix!r}; leave it out")
    manager = manager_of(model)
    manager.delete_adapter(adapter_name)
    return list(manager.active_adapters) or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Bring an adapter's floating-point tensors of less than 32 bits to float32, in place; nothing where False."""
    for part in manager_of(model).adapted.parts() if autocast_adapter_dtype else ():
        for tensor in part.adapter_tensors(adapter_name).values() if adapter_name in part.adapter_names() else ():
            if tensor.is_floating_point() and tensor.itemsize < torch.float32.itemsize:
                tensor.data = tensor.data.float()


def _check_class(layer_cls: type[nn.Module]) -> None:
    """That all adapter layers are meant: single ones are switched by their own methods."""
    if not issubclass(AdapterLayer, layer_cls):
        raise AdapterError(
            f"layer_cls: expected LoraLayer, found {layer_cls.__name__}; leave it out, or call the layers' own methods"
        )
