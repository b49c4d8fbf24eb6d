"""Activation checkpointing under the names that the installed transformers has; it was "gradient" in older ones."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

_NEW = hasattr(PreTrainedModel, "is_activation_checkpointing")
#: The field of TrainingArguments.
ARGUMENT = "activation_checkpointing" if _NEW else "gradient_checkpointing"


def is_checkpointing(model: Any) -> bool:
    return model.is_activation_checkpointing if _NEW else model.is_gradient_checkpointing


def enable_checkpointing(model: Any) -> None:
    (model.activation_checkpointing_enable if _NEW else model.gradient_checkpointing_enable)()
