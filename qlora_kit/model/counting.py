"""How many parameters a model with adapters trains, and has."""

from __future__ import annotations

from typing import Any

from ..training.preparation.kbit import count_parameters


def get_nb_trainable_parameters(lora: Any) -> tuple[int, int]:
    """(trainable, all) parameters; a packed k-bit weight counts as the weights it holds."""
    return count_parameters(lora)


def print_trainable_parameters(lora: Any) -> None:
    """Print both, as PEFT does."""
    trainable, total = lora.get_nb_trainable_parameters()
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")
