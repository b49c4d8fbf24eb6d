"""The same adapters on the same TinyNet, in this toolkit and in peft, and their deltas as float64 arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_nets import base_net

from qlora_kit import LoraConfig, LoraModel, apply_lora

PATHS = ("emb", "fc", "proj", "conv", "head")

# What peft says about this tiny model, none of it about the combinations.
peft_talks = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set:UserWarning",
    "ignore:Setting `save_embedding_layers`:UserWarning",
    "ignore:Could not identify embedding layer:UserWarning",
    "ignore:The density 1.0 is greater than or equal to 1:UserWarning",
)


def fill_(lora: LoraModel, seed: int = 1) -> None:
    """Give every factor and trained copy a value of order 1, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in lora.adapted.parts():
            for name in module.adapter_names():
                for tensor in module.adapter_tensors(name).values():
                    tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))


def ours(*configs: dict[str, Any], paths: tuple[str, ...] = PATHS, seed: int = 1) -> LoraModel:
    """A TinyNet with adapters "a0", "a1", ... of these configurations; by default of rank 2, on ``paths``."""
    lora = None
    for i, fields in enumerate(configs):
        config = LoraConfig(**{"r": 2, "target_modules": list(paths), "fan_in_fan_out": True, **fields})
        if lora is None:
            lora = apply_lora(base_net(), config, f"a{i}")
        else:
            lora.add_adapter(f"a{i}", config)
    assert lora is not None
    fill_(lora, seed)
    return lora.eval()


def in_peft(lora: LoraModel, folder: Path) -> Any:
    """The adapters of ``lora`` in peft, by way of their files."""
    peft = pytest.importorskip("peft", reason="combinations are compared with the installed peft")
    lora.save_pretrained(folder)
    first, *others = lora.peft_config
    theirs = peft.PeftModel.from_pretrained(base_net(), str(folder / first), adapter_name=first)
    for name in others:
        theirs.load_adapter(str(folder / name), name)
    return theirs.eval()


def deltas(lora: LoraModel, name: str) -> dict[str, np.ndarray]:
    """scaling * B @ A of each module that ``name`` adapts, (out, in)."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        if name in layer.r:
            A, B = (factor.detach().double().numpy() for factor in layer.factors(name))
            found[path] = layer.scaling[name] * (B @ A)
    return found


def peft_deltas(theirs: Any, name: str) -> dict[str, np.ndarray]:
    """The same of a model of peft's, from its factors and scaling."""
    found = {}
    for path, layer in theirs.base_model.model.named_modules():
        if hasattr(layer, "lora_embedding_A") and name in layer.scaling:
            if name in layer.lora_embedding_A:
                A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
            else:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            A, B = (factor.detach().double().flatten(1).numpy() for factor in (A, B))
            found[path] = layer.scaling[name] * (B @ A)
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for path in found:
        apart = np.linalg.norm(found[path] - expected[path])
        assert apart <= tolerance * np.linalg.norm(expected[path]) + 1e-30, (path, apart)
