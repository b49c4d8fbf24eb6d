"""The stored TinyNet of the golden adapters, adapters with trained values on it, and its state for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_net import CASES, TinyNet, randomize_trainable_
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base_net() -> TinyNet:
    model = TinyNet().eval()
    model.load_state_dict(load_file(GOLDEN / "base.safetensors"))
    return model


def ids() -> torch.Tensor:
    return load_file(GOLDEN / "expected.safetensors")["ids"]


def trained(case: str = "linear", **changes: Any) -> LoraModel:
    """A TinyNet with an adapter whose parameters, biases and copies all differ from their start."""
    lora = apply_lora(base_net(), LoraConfig(**{**CASES[case], **changes}))
    randomize_trainable_(lora)
    return lora.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key
