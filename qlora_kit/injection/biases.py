"""Training the base model's own biases (``bias="all"`` or ``"lora_only"``), and the way back.

Biases aren't copied for an adapter as whole modules are: they are the base's parameters, trained in place. What
they were before is kept, so that switching the adapter off, unloading or deleting it gives the base model again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers import AdapterLayer, ModulesToSave
from ..naming import Tree, base_of, module_at


def bias_parameters(model: nn.Module | Tree, bias: str) -> dict[str, nn.Parameter]:
    """The biases that ``bias`` ("none", "all" or "lora_only") trains, by the path of their module."""
    found: dict[str, nn.Parameter] = {}
    for path, module in Tree.of(model).modules.items() if bias != "none" else ():
        parameter = base_of(module)._parameters.get("bias")
        wanted = isinstance(module, AdapterLayer) or (bias == "all" and not isinstance(module, ModulesToSave))
        if parameter is not None and wanted:
            found[path] = parameter
    return found


class KeptBiases:
    """The values of some biases from before training; ``swap_`` exchanges them for the present ones."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def keep(self, parameters: dict[str, nn.Parameter]) -> None:
        for path, parameter in parameters.items():
            self.values.setdefault(path, parameter.detach().clone())

    @torch.no_grad()
    def swap_(self, model: nn.Module) -> None:
        """Put the kept values into ``model`` and keep what was there; twice is nothing."""
        for path, kept in self.values.items():
            parameter = base_of(module_at(model, path))._parameters["bias"]
            if parameter is not None:
                self.values[path] = parameter.detach().clone()
                parameter.copy_(kept)
