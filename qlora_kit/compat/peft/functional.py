"""What is done to a bare model with layers injected: PEFT's functions of the methods that a wrapper has."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..injecting import inject_adapter_in_model, manager_of
from ..state import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = [
    "delete_adapter",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "set_adapter",
    "set_peft_model_state_dict",
    "set_requires_grad",
]


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
    """Make one or several adapters the active ones, and (unless ``inference_mode``) the trainable ones."""
    manager_of(model).set_adapter(adapter_name, inference_mode)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Train or freeze adapters without changing which ones are active."""
    manager_of(model).set_requires_grad(adapter_names, requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Forget an adapter."""
    manager_of(model).delete_adapter(adapter_name)
