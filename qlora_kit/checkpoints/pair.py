"""Two checkpoints of one model side by side, whatever prefix, head, shards and types each was stored with.

A tensor is known by its name in *the model*: the tuned one, or the base where the tuned checkpoint is the same without
its head. What is stored with or without the backbone's prefix, under a name of an older release, under one of two tied
names, or as the codes and scales of a quantized module, is found under that name all the same. Nothing but the shards'
headers is read until a difference is asked for, and then these two tensors alone.

Names that don't pair are sorted by what they can mean. A module that only the base's own class has (BERT's head for
masked words beside a tuned classifier) is no part of the tuned model and is only listed. What only the tuned checkpoint
has, or has in another shape, can't be a difference, but can be stored whole. All else is a checkpoint that isn't whole
or isn't of this model, and an error.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import StorageError, closest
from .model_folder import locate, read_settings, skeleton
from .quantized_tensors import packing_of, weight_of
from .shards import ShardReader
from .stored_names import StoredNames, tied_names

_PIECE = 1 << 22
_OLD_BUFFERS = (".inv_freq", ".position_ids", ".masked_bias", ".attn.bias")


class Side:
    """One of the two checkpoints.

    Attributes:
        own: its own model on the meta device.
        quantization: how config.json says that its weights are stored.
        names: stored names, by those in the model.
        parts: of quantized weights, all stored names by their names in the module.
        extra: stored names that the model doesn't have, by these names without the backbone's prefix.
        variants: names that the model may have for a stored one.
    """

    def __init__(self, folder: Path, own: nn.Module) -> None:
        self.folder, self.own = folder, own
        self.quantization = read_settings(folder).get("quantization_config")
        self.reader = ShardReader(folder)
        self.types = self.reader.types()
        self.names: dict[str, str] = {}
        self.parts: dict[str, dict[str, str]] = {}
        self.extra: dict[str, str] = {}

    def assign_(self, model: nn.Module) -> None:
        """Find the names of ``model`` among those that are stored; tied ones all under the first of their names."""
        found = StoredNames(model, self.reader, quantized=True)
        self.model, self.names, self.parts = model, dict(found.stored), found.parts
        for name, first in tied_names(model).items():
            if name in self.names:
                self.names.setdefault(first, self.names.pop(name))
        self.variants = found.variants
        self.extra = {stored.removeprefix(found.variants.prefix): stored for stored in found.foreign}

    def tensor(self, name: str) -> Tensor:
        """The tensor ``name`` of the model, as it is stored; float32 (out, in) of a quantized linear layer."""
        if name not in self.parts:
            return self.reader.tensor(self.names[name])
        path = name.removesuffix(".weight")
        linear: Any = self.model.get_submodule(path)
        tensors = {part: self.reader.tensor(stored) for part, stored in self.parts[name].items()}
        kind, options = packing_of(self.quantization, lambda module: module == path)
        where = f"{self.folder}: {self.names[name].removesuffix('weight')}"
        return weight_of(tensors, (linear.out_features, linear.in_features), kind, options, where)

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.parts:
            return tuple(self.model.get_parameter(name).shape)
        return self.types[self.names[name]][1]


class CheckpointPair:
    """A base and a tuned checkpoint of one model, checked to be that.

    Attributes:
        model: whose names are used; on the meta device.
        shared: names that both hold in one shape; last those that the model doesn't have (experts stored one by one).
        only_tuned, resized: names of what only the tuned one has, or has in another shape.
        only_base: stored names of what only the base's class has.

    Raises:
        StorageError: a folder holds no model, both are one, they are of two architectures, or a tensor is missing,
            unknown to the model or of another shape than config.json says.
    """

    def __init__(self, base: str | os.PathLike[str], tuned: str | os.PathLike[str]) -> None:
        folders = locate(base, "base"), locate(tuned, "tuned")
        if os.path.realpath(folders[0]) == os.path.realpath(folders[1]):
            raise StorageError(
                f"{folders[0]}: expected two checkpoints, found one folder for both; pass the tuned one's"
            )
        if read_settings(folders[1]).get("quantization_config") is not None:
            raise StorageError(
                f"{folders[1]}: expected a tuned model in 16 or 32 bits, found one that is quantized; pass it as it "
                "was before (the base may be quantized)"
            )
        self.base, self.tuned = (Side(folder, skeleton(folder, quantized=True)) for folder in folders)
        kinds = [getattr(side.own.config, "model_type", None) for side in (self.base, self.tuned)]
        if kinds[0] != kinds[1]:
            raise StorageError(
                f"{folders[1]}: expected a model of the base's architecture, {kinds[0]!r}, found {kinds[1]!r}; pass "
                "the model that this one was tuned from"
            )
        self.model = self.base.own if _headless(self.tuned.own) and not _headless(self.base.own) else self.tuned.own
        for side in (self.base, self.tuned):
            side.assign_(self.model)
        self._check_ties()
        base_names, tuned_names = self.base.names.keys(), self.tuned.names.keys()
        self.only_tuned = sorted(tuned_names - base_names)
        self._check_layers()
        self.only_base = self._heads_of_the_base()
        both = sorted(base_names & tuned_names)
        self.resized = [name for name in both if self.base.shape(name) != self.tuned.shape(name)]
        self.shared = [name for name in both if name not in self.resized] + self._unknown_to_the_model()
        self._check_shapes()

    def difference(self, name: str) -> tuple[Tensor, float]:
        """Tuned minus base, float32 in the shape that is stored, and the Frobenius norm of the base's tensor.

        The subtraction is in float32; in float64 where one of the two is, or holds integers.

        Raises:
            StorageError: a NaN or infinity in one of the two; says which.
        """
        before, after = (self._finite(side, name) for side in (self.base, self.tuned))
        exact = any(t.dtype == torch.float64 or not t.is_floating_point() for t in (before, after))
        if not before.is_floating_point():
            before = before.double()
        # A base of 16 bits is widened within the subtraction, without a copy.
        return (after.to(torch.float64 if exact else torch.float32) - before).float(), norm(before)

    def _finite(self, side: Side, name: str) -> Tensor:
        tensor = side.tensor(name) if name in side.names else side.reader.tensor(side.extra[name])
        if tensor.is_floating_point():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if bad := int((~wide.isfinite()).sum()):
                raise StorageError(
                    f"{side.folder}: {name}: expected finite values, found {bad} NaN or infinite of "
                    f"{tensor.numel()}; repair the checkpoint, there is no difference of these"
                )
            return wide
        return tensor

    def _check_ties(self) -> None:
        """Refuse a pair of which one is tied where the other isn't: an adapter would reach two tensors, or too few."""
        first, second = (tied_names(side.own) for side in (self.base, self.tuned))
        common = set(self.base.own.state_dict()) & set(self.tuned.own.state_dict())
        for name in sorted(common & (first.keys() ^ second.keys())):
            tied, untied = (self.base, self.tuned) if name in first else (self.tuned, self.base)
            raise StorageError(
                f"{name}: expected the same tied weights in both, found it tied to "
                f"{(first | second)[name]} in {tied.folder} and of its own in {untied.folder}; save the tied one "
                "untied first (give it a copy of the weight and set config.tie_word_embeddings = False)"
            )

    def _check_layers(self) -> None:
        for name in self.only_tuned:
            if any(_lacks_a_layer(self.base.own, variant) for variant in self.tuned.variants(name)):
                raise StorageError(
                    f"{self.tuned.folder}: expected the base's layers, found {name!r}, of a layer that the model in "
                    f"{self.base.folder} doesn't have; pass the model that this one was tuned from"
                )

    def _heads_of_the_base(self) -> list[str]:
        heads = []
        for name in sorted(self.base.names.keys() - self.tuned.names.keys()):
            if not self._only_of_the_bases_class(name):
                raise StorageError(
                    f"{self.tuned.folder}: expected a tensor {name!r} as in the base, found none; the closest are "
                    f"{closest(name, self.tuned.reader)}; finish the download or save the tuned model again"
                )
            heads.append(self.base.names[name])
        for raw, stored in self.base.extra.items():
            if raw not in self.tuned.extra and not self._ignored(stored):
                if not self._only_of_the_bases_class(stored):
                    self._refuse_extra(self.base, stored)
                heads.append(stored)
        for raw, stored in self.tuned.extra.items():
            if raw not in self.base.extra and not self._ignored(stored):
                self._refuse_extra(self.tuned, stored)
        return sorted(heads)

    def _only_of_the_bases_class(self, name: str) -> bool:
        """Whether ``name`` is of a module that the base's class has and the tuned model's doesn't, such as a head; a
        layer that only one of the two models has is none of these."""
        base, tuned = self.base.own, self.tuned.own
        variants = self.tuned.variants(name)
        return (
            type(base) is not type(tuned)
            and any(variant in base.state_dict() for variant in variants)
            and not any(variant in tuned.state_dict() for variant in variants)
            and not any(_lacks_a_layer(tuned, variant) for variant in variants)
        )

    def _unknown_to_the_model(self) -> list[str]:
        """Names of tensors that both hold and the model, as it is built, does not."""
        found = sorted(self.base.extra.keys() & self.tuned.extra.keys())
        for name in found:
            shapes = [side.types[side.extra[name]][1] for side in (self.base, self.tuned)]
            if shapes[0] != shapes[1]:
                raise StorageError(
                    f"{name}: expected one shape in both checkpoints, found {shapes[0]} in {self.base.folder} and "
                    f"{shapes[1]} in {self.tuned.folder}; pass two checkpoints of one model"
                )
        return found

    def _check_shapes(self) -> None:
        wanted = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        resized = set(self.resized)
        for side in (self.base, self.tuned):
            for name, expected in wanted.items():
                whose = side.own is self.model or name not in resized
                if name in side.names and whose and side.shape(name) != expected:
                    raise StorageError(
                        f"{side.folder}: {name}: expected shape {expected}, as config.json says, found "
                        f"{side.shape(name)}; the shards belong to another model, or are quantized already"
                    )

    def _ignored(self, stored: str) -> bool:
        """Whether ``stored`` is a buffer that models of old releases kept and all now compute for themselves."""
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return stored.endswith(_OLD_BUFFERS) or any(re.search(pattern, stored) for pattern in patterns)

    def _refuse_extra(self, side: Side, stored: str) -> None:
        other = self.tuned if side is self.base else self.base
        raise StorageError(
            f"{side.folder}: expected the tensors of a {type(self.model).__name__} as in {other.folder}, found "
            f"{stored!r}, which neither the other checkpoint nor the model has; the closest are "
            f"{closest(stored, self.model.state_dict())}; pass two checkpoints of one model"
        )


def norm(tensor: Tensor) -> float:
    """The Frobenius norm, summed in float64, a piece at a time."""
    return math.sqrt(sum(float(piece.double().square().sum()) for piece in tensor.reshape(-1).split(_PIECE)))


def _lacks_a_layer(model: nn.Module, name: str) -> bool:
    """Whether ``name`` leads into a list of modules in ``model``, and to none of them."""
    module: nn.Module = model
    for piece in name.split("."):
        child = module._modules.get(piece)
        if child is None:
            return isinstance(module, (nn.ModuleList, nn.Sequential))
        module = child
    return False


def _headless(model: nn.Module) -> bool:
    return getattr(model, "base_model", model) is model
