"""A model's checkpoint by the names of its modules: which stored tensors belong to which parameter, and what is tied.

A tensor is known by its name in *the model* that config.json describes, built on the meta device. Checkpoints hold it
under that name, or with or without the backbone's prefix, or under a name of an older release; of tied parameters they
often hold one; and a quantized weight is several tensors (codes, scales, tables), which are gathered here. Only headers
are read, until a module is asked for. Tensors that the model has no name for (experts stored one by one, buffers that
models no longer keep) are listed apart.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import codec_for
from ..errors import StorageError
from ..naming.variants import Variants
from .model_folder import skeleton
from .quantized_tensors import PARTS, module_of, packing_of
from .shards import ShardReader

METHODS = ("bitsandbytes", "qlora_kit")


class StoredModel:
    """The checkpoint in ``folder``.

    Args:
        overrides: entries of config.json to be taken in the place of the folder's, see ``trained_config``.

    Attributes:
        model: on the meta device, all its modules dense.
        settings: what config.json says.
        types: dtype and shape of every stored tensor.
        modules: those of the model by path, each under its first one; ``first`` has that of every path.
        shapes: of the model's parameters and saved buffers, by name.
        names: stored names, by those in the model.
        parts: of quantized weights, all stored names by their names in the module, by the weight's name in the model.
        foreign: stored names that the model doesn't have.
        outgrown: names of tables that have as many rows as the folder's config has words, and not as the model has.

    Raises:
        StorageError: no model, one quantized in a way not known here, or a tensor of another shape than expected.
    """

    def __init__(self, folder: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.model = skeleton(folder, quantized=True, **(overrides or {}))
        self.settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._take_over(overrides or {})
        self._check_method()
        self.reader = ShardReader(folder)
        self.types = self.reader.types()
        paths: dict[int, str] = {}
        self.first = {
            path: paths.setdefault(id(module), path)
            for path, module in self.model.named_modules(remove_duplicate=False)
        }
        self.modules = {path: self.model.get_submodule(path) for path in paths.values()}
        state = self.model.state_dict()
        self.known = {name: self._first_name(name) for name in state}
        self.shapes = {self.known[name]: tuple(tensor.shape) for name, tensor in state.items()}
        self.variants = Variants(self.model)
        self.names: dict[str, str] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.foreign: list[str] = []
        self.outgrown: list[str] = []
        self._sort()
        if overrides:  # what the folder's own class knows is its head
            own = set(skeleton(folder, quantized=True).state_dict())
            self.foreign = [name for name in self.foreign if own.isdisjoint(self.variants(name))]
        self._check_shapes(resized="vocab_size" in (overrides or {}))

    def name_of(self, name: str) -> str | None:
        """The model's name for what a checkpoint or an adapter calls ``name``; None if it has none."""
        return next((self.known[variant] for variant in self.variants(name) if variant in self.known), None)

    def path_of(self, path: str) -> str | None:
        """The model's path of the module that an adapter calls ``path``; None if it has none."""
        found = next((self.first[p] for p in self.variants.of_prefix(path) if p and p in self.first), None)
        weight = self.name_of(f"{path}.weight") if found is None else None
        return found if weight is None else weight.removesuffix(".weight")

    def output_name(self, name: str) -> str:
        """What a checkpoint should call the model's ``name``: the same, or what this one calls it where transformers
        has a renaming, which it reverses on saving."""
        stored = self.names.get(name, name)
        own = next((self.known[variant] for variant in self.variants.of_prefix(stored) if variant in self.known), None)
        return name if own == name else stored

    def ties(self) -> list[list[str]]:
        """Groups of names, by first paths, that one parameter has in the model."""
        return tied_groups(self.model, self.known)

    def module(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module whose weight is called ``name``, without its bias, holding ``tensors``.

        Args:
            tensors: by their names in the module: "weight" alone, in the shape that is stored, or with the parts of a
                quantized one.
        """
        path = name.rpartition(".")[0]
        own = self.modules[path]
        if len(tensors) == 1:
            return holding(own, tensors["weight"])
        kind, options = packing_of(self.settings.get("quantization_config"), lambda p: self.path_of(p) == path)
        return module_of(tensors, codec_for(own, path).shape(own), kind, options, f"{self.folder}: {path}.")

    def _sort(self) -> None:
        left = []
        for stored in self.types:
            name = self.name_of(stored)
            if name is None:
                left.append(stored)
            elif name in self.names and self.name_of(self.names[name]) == name == self.names[name]:
                continue  # a shared module's tensor that is stored twice
            else:
                self.names[name] = stored
        quantized = bool(self.settings.get("quantization_config"))
        for stored in left:
            part = next((part for part in PARTS if stored.endswith(f".{part}")), None) if quantized else None
            if part is None:
                self.foreign.append(stored)
                continue
            stem = stored.removesuffix(part)
            weight = self.name_of(f"{stem}weight")
            if weight is None:
                raise StorageError(
                    f"{self.folder}: expected quantized tensors of modules that {type(self.model).__name__} has, found "
                    f"{stored!r} of none; dequantize this module before, or leave it in 16 bits"
                )
            self.parts.setdefault(weight, {"weight": self.names[weight]})[part] = stored

    def _first_name(self, name: str) -> str:
        path, _, local = name.rpartition(".")
        return f"{self.first[path]}.{local}" if path in self.first and path else name

    def _take_over(self, overrides: Mapping[str, Any]) -> None:
        """Have ``settings`` say what ``overrides`` says, in the words that transformers writes."""
        for key, value in overrides.items():
            if key == "num_labels":
                labels: dict[int, str] = self.model.config.id2label  # type: ignore[union-attr,assignment]
                self.settings["id2label"] = {str(number): label for number, label in labels.items()}
                self.settings["label2id"] = {label: number for number, label in labels.items()}
            else:
                self.settings[key] = value

    def _check_method(self) -> None:
        quantization = self.settings.get("quantization_config")
        if quantization and quantization.get("quant_method") not in METHODS:
            raise StorageError(
                f"{self.folder}: expected weights in 16 or 32 bits, or quantized by one of {list(METHODS)}, found "
                f"quant_method={quantization.get('quant_method')!r}; pass the 16-bit model that it was made from"
            )

    def _check_shapes(self, *, resized: bool) -> None:
        for name, stored in self.names.items():
            dtype, shape = self.types[stored]
            if resized and shape[1:] == self.shapes[name][1:] and shape != self.shapes[name]:
                self.outgrown.append(name)
                continue
            if name not in self.parts and (shape != self.shapes[name] or dtype in (torch.uint8, torch.int8)):
                raise StorageError(
                    f"{self.folder}: {stored}: expected a tensor of shape {self.shapes[name]}, as config.json says, "
                    f"found {dtype} {shape}; the shards are another model's, or a tensor of a quantized one is missing"
                )


def holding(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of ``module`` without its bias, with ``weight`` as it is stored."""
    new = copy.copy(module)
    new._parameters = {name: None if name == "bias" else p for name, p in module._parameters.items()}
    new._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return new


def tied_groups(model: nn.Module, known: Mapping[str, str]) -> list[list[str]]:
    """Names that one parameter of ``model`` has, if several; ``known`` maps each name to its module's first."""
    groups: dict[int, dict[str, None]] = defaultdict(dict)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)][known.get(name, name)] = None
    return [list(names) for names in groups.values() if len(names) > 1]
