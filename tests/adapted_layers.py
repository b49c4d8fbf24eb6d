"""One module inside a model, adapters on it with values away from the start, and the reference's view of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from reference import branches as ref
from torch import Tensor, nn

from qlora_kit import AdapterLayer, LoraConfig, LoraModel, apply_lora

# Largest error relative to the largest value of the float64 result: a few roundings of the dtype that computes,
# over sums of up to 200 terms. float64 modules get float64 adapters.
RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def adapt(module: nn.Module, adapters: int = 1, **config: Any) -> tuple[LoraModel, AdapterLayer]:
    """``module`` under the name "layer" with ``adapters`` active adapters of different ranks and alphas."""
    lora: LoraModel | None = None
    model = nn.ModuleDict({"layer": module})
    names = [f"a{i}" for i in range(adapters)]
    for i, name in enumerate(names):
        settings = {"r": 3 + i, "lora_alpha": 5 - i, "target_modules": ["layer"], **config}
        if lora is None:
            lora = apply_lora(model, LoraConfig(**settings), name)
        else:
            lora.add_adapter(name, LoraConfig(**settings))
    assert lora is not None
    lora.set_adapter(names)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in lora.named_parameters():
            if "lora_" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    (layer,) = lora.adapter_layers().values()
    return lora, layer


def branches(layer: AdapterLayer) -> list[ref.Branch]:
    """Factors as they are stored, flattened here and not by the layer; the scaling from its definition."""
    found = []
    for name in layer.active_adapters:
        A, B = (ref.array(t) for t in layer.adapter_tensors(name).values())
        rank, alpha = layer.r[name], layer.lora_alpha[name]
        scaling = alpha / (rank**0.5 if layer.use_rslora[name] else rank)
        found.append((A.reshape(len(A), -1), B.reshape(len(B), -1), scaling))
    return found


def assert_near(found: Tensor, expected: np.ndarray, dtype: torch.dtype, what: str = "") -> None:
    assert tuple(found.shape) == expected.shape, what
    error = np.abs(ref.array(found) - expected).max(initial=0.0)
    assert error <= RELATIVE[dtype] * max(np.abs(expected).max(initial=0.0), 1e-3), (what, error)
