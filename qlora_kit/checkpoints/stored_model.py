"""A model's checkpoint by the names of its modules: what is stored of each, and the modules themselves.

The model is the one that config.json describes, built on the meta device; ``stored_names`` says which stored tensors
are which of its own. Only headers are read, until a module is asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import codec_for
from ..codecs.packed import PackedLinear
from ..errors import StorageError
from .model_folder import read_settings, skeleton
from .quantized_tensors import module_of, packing_of
from .shards import ShardReader
from .stored_names import StoredNames, part_of

METHODS = ("bitsandbytes", "qlora_kit")


class StoredModel:
    """The checkpoint in ``folder``.

    Args:
        overrides: entries of config.json to be taken in the place of the folder's, see ``trained_config``.

    Attributes:
        model: on the meta device, all its modules dense.
        settings: what config.json says.
        types: dtype and shape of every stored tensor.
        modules: those of the model by path, each under its first one.
        shapes: of the model's parameters and saved buffers, by name.
        names: which stored tensors are which of the model's.
        outgrown: names of tables that have as many rows as the folder's config has words, and not as the model has.

    Raises:
        StorageError: no model, one quantized in a way not known here, or a tensor of another shape than expected.
    """

    def __init__(self, folder: Path, overrides: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        self.model = skeleton(folder, quantized=True, **(overrides or {}))
        self.settings = read_settings(folder)
        self._take_over(overrides or {})
        self._check_method()
        self.reader = ShardReader(folder)
        self.types = self.reader.types()
        quantized = bool(self.settings.get("quantization_config"))
        self.names = StoredNames(self.model, self.types, quantized=quantized)
        self.modules = {path: self.model.get_submodule(path) for path in dict.fromkeys(self.names.first.values())}
        self.shapes = {self.names.known[name]: tuple(t.shape) for name, t in self.model.state_dict().items()}
        self.outgrown: list[str] = []
        if quantized:
            self._check_parts()
        self._check_scales()
        if overrides:  # what the folder's own class knows is its head
            own = StoredNames(skeleton(folder, quantized=True))
            self.names.foreign = [name for name in self.names.foreign if own.name_of(name) is None]
        self._check_shapes(resized="vocab_size" in (overrides or {}))

    def module(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module whose weight is called ``name``, without its bias, holding ``tensors``.

        Args:
            tensors: by their names in the module: "weight" alone, in the shape that is stored, or with the parts of a
                quantized one.
        """
        path = name.rpartition(".")[0]
        own = self.modules[path]
        if len(tensors) == 1:
            return holding(own, widened(tensors["weight"]))
        kind, options = packing_of(self.settings.get("quantization_config"), lambda p: self.names.path_of(p) == path)
        made = module_of(tensors, codec_for(own, path).shape(own), kind, options, f"{self.folder}: {path}.")
        if isinstance(made, PackedLinear):  # whose tensors don't say it, and a type it is requantized to notes it
            made.compute_dtype = getattr(self.model.config, "dtype", None) or made.compute_dtype
        return made

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

    def _check_parts(self) -> None:
        for stored in self.names.foreign:
            if part_of(stored):
                raise StorageError(
                    f"{self.folder}: expected quantized tensors of modules that {type(self.model).__name__} has, found "
                    f"{stored!r} of none; dequantize this module before, or leave it in 16 bits"
                )

    def _check_scales(self) -> None:
        """Weights in float8 are what they say, unless scales of theirs are stored beside."""
        narrow = {n.rpartition(".")[0] for n in self.names.stored.values() if is_float8(self.types[n][0])}
        for stored in self.names.foreign:
            path, _, name = stored.rpartition(".")
            if path in narrow and "scale" in name:
                raise StorageError(
                    f"{self.folder}: expected float8 weights that are the matrices themselves, found scales beside "
                    f"them ({stored!r}) and nothing in config.json that says how they are meant; pass the 16-bit model"
                )

    def _check_shapes(self, *, resized: bool) -> None:
        for name, stored in self.names.stored.items():
            dtype, shape = self.types[stored]
            if resized and shape[1:] == self.shapes[name][1:] and shape != self.shapes[name]:
                self.outgrown.append(name)
                continue
            if name not in self.names.parts and (shape != self.shapes[name] or dtype in (torch.uint8, torch.int8)):
                raise StorageError(
                    f"{self.folder}: {stored}: expected a tensor of shape {self.shapes[name]}, as config.json says, "
                    f"found {dtype} {shape}; the shards are another model's, or a tensor of a quantized one is missing"
                )


def is_float8(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one of float8's, in which nothing is computed."""
    return dtype.is_floating_point and dtype.itemsize == 1


def widened(tensor: Tensor) -> Tensor:
    """``tensor``; one in float8 in bfloat16, where its values are the same."""
    return tensor.bfloat16() if is_float8(tensor.dtype) else tensor


def holding(module: nn.Module, weight: Tensor) -> nn.Module:
    """A copy of ``module`` without its bias, with ``weight`` as it is stored."""
    new = copy.copy(module)
    new._parameters = {name: None if name == "bias" else p for name, p in module._parameters.items()}
    new._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    return new
