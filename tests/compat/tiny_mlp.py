"""The smallest model that the tests of PEFT's names adapt."""

from __future__ import annotations

from typing import Any

from torch import nn

from qlora_kit.compat.peft import LoraConfig, PeftModel, get_peft_model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def wrapped(**fields: Any) -> PeftModel:
    return get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "2"], **fields))
