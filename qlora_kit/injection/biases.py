"""Training the base model's own biases (``bias="all"`` or ``"lora_only"``), and the way back.

Biases aren't copied for an adapter as whole modules are: they are the base's parameters, trained in place. What
they were before is kept, so that switching the adapter off, unloading or deleting it gives the base model again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..codecs.shards.tensors import fill_, whole
from ..layers import AdapterLayer, ModulesToSave
from ..naming import Tree, base_of, chain, module_at


def bias_parameters(model: nn.Module | Tree, bias: str, adapter_name: str | None = None) -> dict[str, nn.Parameter]:
    """The biases that ``bias`` ("none", "all" or "lora_only") of an adapter trains, by the path of their module.

    What other adapters put in a module's place changes nothing: each trains what it would train alone.
    """
    found: dict[str, nn.Parameter] = {}
    for path, module in Tree.of(model).modules.items() if bias != "none" else ():
        parameter = base_of(module)._parameters.get("bias")
        own = [type(link) for link in own_parts(module, adapter_name)]
        wanted = ModulesToSave not in own if bias == "all" else any(issubclass(kind, AdapterLayer) for kind in own)
        if parameter is not None and wanted:
            found[path] = parameter
    return found


def own_parts(module: nn.Module, adapter_name: str | None) -> list[AdapterLayer | ModulesToSave]:
    """What adapter ``adapter_name`` has in the place of ``module``: a branch, a trained copy, or nothing."""
    parts = [link for link in chain(module) if isinstance(link, (AdapterLayer, ModulesToSave))]
    return [part for part in parts if adapter_name in part.adapter_names()]


class KeptBiases:
    """The values of some biases from before training; ``swap_`` exchanges them for the present ones."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def keep(self, parameters: dict[str, nn.Parameter]) -> None:
        first: dict[int, str] = {}
        for path, parameter in parameters.items():  # once, or exchanging at two places would lose what was trained
            if first.setdefault(id(parameter), path) == path:
                self.values.setdefault(path, parameter.detach().clone())

    @torch.no_grad()
    def swap_(self, model: nn.Module) -> None:
        """Put the kept values into ``model`` and keep what was there; twice is nothing. A collective where they are
        sharded."""
        for path, kept in self.values.items():
            parameter = base_of(module_at(model, path))._parameters["bias"]
            if parameter is not None:
                self.values[path] = whole(parameter).clone()
                fill_(parameter, kept)
