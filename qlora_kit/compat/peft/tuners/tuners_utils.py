"""The bases of layers and models."""

from __future__ import annotations

from ....layers import AdapterLayer as BaseTunerLayer
from ....model.lora_model import LoraModel as BaseTuner
from ....naming import Tree
from ...configs import PeftConfig
from ...matching import check_target_module_exists
from ...matching import find_minimal_target_modules as _find_minimal_target_modules

__all__ = [
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "_find_minimal_target_modules",
    "check_target_module_exists",
    "inspect_matched_modules",
]


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Paths of the base model's modules, by whether adapter ``adapter_name`` targets them: "matched", "unmatched"."""
    matched = [path for path, layer in tuner.adapter_layers().items() if adapter_name in layer.r]
    every: list[str] = [path for path in Tree(tuner.model).modules if path]
    return {"matched": matched, "unmatched": [path for path in every if path not in set(matched)]}
