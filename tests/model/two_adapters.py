"""Models with two adapters, and what each gives by itself."""

from __future__ import annotations

from typing import Any

import torch
from tiny_llama import llama
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora

#: Relative to the largest value. Products of some rows are summed in another order than those of all, the scaling
#: stands at another place, and each layer carries the difference on; that of two adapters is of order 1.
NEAR = 1e-4
NAMES = ["q", "__base__", "p", "q"]
IDS = torch.randint(1, 128, (4, 6), generator=torch.Generator().manual_seed(2))


def with_two(model: nn.Module, targets: Any, wrap: Any = apply_lora, config: Any = LoraConfig) -> Any:
    """Adapters of other ranks and scalings, with values that matter; of names that aren't in "lora_", as peft warns."""
    lora = wrap(model, config(r=4, lora_alpha=12, target_modules=targets, lora_dropout=0.5), "p")
    lora.add_adapter("q", config(r=2, lora_alpha=5, target_modules=targets, use_rslora=True))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return lora.eval()


def two(**settings: Any) -> LoraModel:
    return with_two(llama(**settings), "all-linear")


def alone(lora: Any, name: str, call: Any) -> Any:
    """``call()`` with adapter ``name`` active, or none."""
    if name == "__base__":
        with lora.disable_adapter():
            return call()
    before = lora.active_adapters
    lora.set_adapter(name)
    result = call()
    lora.set_adapter(before)
    return result
