"""Small originals that foretell something, quantized copies of them with adapters, and what changed in these."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_llama import VOCABULARY, llama
from torch import Tensor, nn

from loftq import SoftLabels, distill, soft_labels
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora
from qlora_kit.codecs import find_codec


def rows(count: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCABULARY, (count, 12), generator=torch.Generator().manual_seed(seed))


def lively(**settings: Any) -> nn.Module:
    """A model that foretells more than that all tokens are alike."""
    model = llama(**{"num_hidden_layers": 1, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model.eval()


@cache
def labels_of(count: int = 12, seed: int = 0) -> SoftLabels:
    """What ``lively()`` foretells of ``rows(count, seed)``."""
    return soft_labels(lively(), rows(count, seed))


def started(storage: str = "signed2", **options: Any) -> LoraModel:
    """A copy of ``lively()`` in that storage, with adapters that have a start and something left to learn."""
    model = lively()
    if storage == "bfloat16":
        lora = apply_lora(model.bfloat16(), LoraConfig(r=4, target_modules="all-linear", **options))
        with torch.no_grad():
            for layer in lora.adapter_layers().values():
                layer.base_layer.weight.mul_(1.5)
        return lora
    bits = int(storage[-1])
    loftq = LoftQConfig(loftq_bits=bits, quant_type=storage, method="loftq", calibration=None)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights="loftq", loftq_config=loftq, **options)
    lora = apply_lora(model, config)
    if storage == "int8":  # which leaves next to nothing to learn
        torch.manual_seed(0)
        for layer in lora.adapter_layers().values():
            layer.factors("default")[1].data.add_(0.05 * torch.randn(layer.factors("default")[1].shape))
    return lora


def state(lora: LoraModel) -> dict[str, Tensor]:
    found = {name: tensor.detach().clone() for name, tensor in lora.state_dict().items()}
    for path, layer in lora.adapter_layers().items():
        codec = find_codec(layer.base_layer)
        assert codec is not None
        found[f"{path} read"] = codec.read(layer.base_layer).clone()
    return found


def changed(before: dict[str, Tensor], lora: LoraModel) -> set[str]:
    return {name for name, tensor in state(lora).items() if not torch.equal(tensor, before[name])}


def distance(lora: LoraModel, labels: SoftLabels) -> float:
    """Of ``lora`` from labels, without learning anything."""
    return distill(lora, labels, passes=1e-9, learning_rate=1e-30, batch_rows=1).before
