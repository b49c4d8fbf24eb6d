"""A model of one module of each kind, small enough to store, and the adapter configs tried on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class TinyNet(nn.Module):
    """(batch, 4) token ids below 11 to (batch, 3) logits."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(11, 8)
        self.fc = nn.Linear(8, 8)
        self.proj = Conv1D(8, 8)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(8, 6, kernel_size=2, padding=1)
        self.head = nn.Linear(54, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.proj(torch.tanh(self.fc(self.emb(ids)))))
        image = x.transpose(1, 2).unflatten(2, (2, 2))
        return self.head(torch.tanh(self.conv(image)).flatten(1))


# Keyword arguments that PEFT's LoraConfig and ours both take.
CASES: dict[str, dict[str, Any]] = {
    "linear": {"r": 2, "target_modules": ["fc", "head"], "lora_alpha": 3},
    "embedding": {"r": 2, "target_modules": ["emb"]},
    "conv1d": {"r": 2, "target_modules": ["proj"], "fan_in_fan_out": True},
    "conv2d": {"r": 2, "target_modules": ["conv"]},
    "rslora": {"r": 4, "target_modules": ["fc", "conv"], "use_rslora": True},
    "rank_pattern": {
        "r": 2,
        "target_modules": "fc|head",
        "rank_pattern": {"fc": 3},
        "alpha_pattern": {"^head$": 5},
    },
    "bias_all": {"r": 2, "target_modules": ["fc"], "bias": "all", "modules_to_save": ["head"]},
    "bias_lora_only": {"r": 2, "target_modules": ["fc", "conv"], "bias": "lora_only"},
    "modules_to_save": {"r": 2, "target_modules": ["fc"], "modules_to_save": ["head", "norm"]},
}


@torch.no_grad()
def randomize_trainable_(model: nn.Module, seed: int = 1) -> None:
    """Give every trainable parameter a value of order 0.3, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
