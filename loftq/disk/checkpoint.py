"""What is to be done with a checkpoint, from its config and the headers of its shards: nothing of it is loaded.

The model is built on the meta device, which gives the modules and their types; the shards say what is stored.
Every stored tensor is a unit of work: the weight of a targeted module is quantized, all else is copied.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.adapter_files.folder import PREFIX
from qlora_kit.checkpoints.model_folder import skeleton, task_type
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.checkpoints.stored_names import StoredNames
from qlora_kit.codecs import Codec, codec_for
from qlora_kit.config.lora import LoftQConfig, LoraConfig
from qlora_kit.errors import StorageError, TargetError, closest
from qlora_kit.initializers import planned
from qlora_kit.injection.engine import Plan, PlanEntry, Request
from qlora_kit.injection.heads import head_of_task, saved_names
from qlora_kit.injection.ranks import lowered
from qlora_kit.injection.targets import resolve_saved
from qlora_kit.naming import Tree
from qlora_kit.training.preparation.quantize import DENSE_LINEARS

from ..starts.kept_dense import kept_dense
from ..starts.startable import DENSE

# Only these are called left out: vectors (norms, biases) aren't meant to be quantized.
_MATRIX = 2


@dataclass(frozen=True)
class StoredTensor:
    """One stored tensor: its name, shape and bytes, and what it is the weight of if that is quantized (``entry``), or
    stays dense under an adapter (``kept``).

    ``copied_as`` is its key in the adapter's file, if it is of a module that the adapter trains whole.
    """

    name: str
    shape: tuple[int, ...]
    nbytes: int
    entry: PlanEntry | None
    kept: PlanEntry | None = None
    copied_as: str | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Checkpoint:
    """A folder with a 16-bit model, and what ``config`` targets in it.

    Args:
        folder: config.json and safetensors.
        config: targets, ranks and alphas; see ``qlora_kit.LoraConfig``.

    Attributes:
        config: with the ranks that the weights can have.
        model: the modules on the meta device.
        names: which stored tensors are which of the model's.
        task_type, modules_to_save: of the adapter's configuration: the head of a task is trained whole.
        plan: what is targeted and quantized.
        kept: what is targeted and stays dense.
        reasons: why, by path.
        lowered: ranks that were asked for where a weight hasn't as many, by path.
        units: every stored tensor, in the order of their names; a targeted weight that is stored twice comes once.
        dtypes: of the targeted modules' weights, by path.

    Raises:
        StorageError: no config, unknown architecture, quantized already, or weights are missing.
        TargetError: the targets match nothing, a convolution, a tied weight, or nothing that few bits can hold.
    """

    def __init__(self, folder: str | os.PathLike[str], config: LoraConfig) -> None:
        self.folder = Path(folder)
        self.reader = ShardReader(self.folder)
        self.model = skeleton(self.folder)
        self.names = StoredNames(self.model, self.reader)
        self.names.check_whole(self.folder)
        self.config, plan = planned(self.model, self._for_its_task(config))
        self.plan, self.kept, self.reasons = _split(self.model, self.config, plan)
        self.lowered = lowered(self.adapted)
        copies = {self.names.stored[name]: PREFIX + name for name in self._inside(self.plan.modules_to_save)}
        self.dtypes: dict[str, torch.dtype] = {}
        by_name: dict[str, PlanEntry] = {}
        kept = {self._stored_name(entry.path): entry for entry in self.kept}
        for entry in self.plan.entries:
            if entry.family == "conv" or entry.codec not in DENSE:
                raise TargetError(
                    f"{entry.path}: expected a linear layer or an embedding to quantize, found a "
                    f"{entry.module_type}; take it out of the targets"
                )
            by_name[self._stored_name(entry.path)] = entry
        quantized = {f"{self.names.path_of(entry.path)}.weight" for entry in by_name.values()}
        again = {stored for stored, name in self.names.twice.items() if name in quantized}
        types = self.reader.types()
        units = [self._unit(name, *types[name], by_name.get(name)) for name in types if name not in again]
        self.units = [replace(u, kept=kept.get(u.name), copied_as=copies.get(u.name)) for u in units]

    @property
    def adapted(self) -> tuple[PlanEntry, ...]:
        """All that gets an adapter."""
        return (*self.plan.entries, *self.kept)

    def empty_module(self, entry: PlanEntry) -> tuple[nn.Module, Codec]:
        """A copy of ``entry``'s module without its bias, the weight on the meta device, and its codec."""
        module = copy.copy(self.model.get_submodule(entry.path))
        module._parameters = {name: None if name == "bias" else p for name, p in module._parameters.items()}
        return module, codec_for(module, entry.path)

    def filled_module(self, entry: PlanEntry, weight: Tensor) -> tuple[nn.Module, Codec]:
        """As ``empty_module``, with ``weight`` as it is stored."""
        module, codec = self.empty_module(entry)
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        return module, codec

    def request(self, entry: PlanEntry, lora: LoraConfig, weight: Tensor | None = None) -> Request:
        """What a start by ``lora`` is told of ``entry``, with ``weight`` as it is stored, or none in memory."""
        module, codec = self.empty_module(entry) if weight is None else self.filled_module(entry, weight)
        scaling = lora.scaling_of(entry.rank, entry.alpha)
        return Request(entry.path, module, codec, entry.rank, scaling, lora, family=entry.family)

    def left_out(self) -> dict[str, tuple[int, int]]:
        """Matrices and stacks of matrices that stay as they are, alike ones together: (how many, bytes)."""
        groups: dict[str, tuple[int, int]] = {}
        for unit in self.units:
            if unit.entry is None and len(unit.shape) >= _MATRIX:
                pattern = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", unit.name))
                count, size = groups.get(pattern, (0, 0))
                groups[pattern] = count + 1, size + unit.nbytes
        return groups

    def _for_its_task(self, config: LoraConfig) -> LoraConfig:
        """``config`` with the model's task, for which its head, if it is stored, is copied into the adapter."""
        tree = Tree(self.model)
        given = resolve_saved(tree, config.modules_to_save)
        if missing := [name for name in self._inside(given) if name not in self.names.stored]:
            raise StorageError(
                f"{missing[0]}: expected it in {self.folder}, for modules_to_save={config.modules_to_save} asks for a "
                "copy of it, found none; leave its module out"
            )
        config = replace(config, task_type=config.task_type or task_type(self.model))
        head = resolve_saved(tree, head_of_task(tree, config.task_type))
        if any(name not in self.names.stored for name in self._inside(head)):  # tied to another
            config = replace(config, task_type=None)
        self.task_type, self.modules_to_save = config.task_type, saved_names(tree, config) or None
        return config

    def _inside(self, paths: Sequence[str]) -> list[str]:
        """The model's names of all tensors inside of the modules at ``paths``."""
        within = tuple(f"{path}." for path in paths)
        return [name for name in dict.fromkeys(self.names.known.values()) if within and name.startswith(within)]

    def _stored_name(self, path: str) -> str:
        name = self.names.weight_of(path)
        if name is None:
            raise StorageError(
                f"{path}: expected its weight in {self.folder}, found no tensor that is it by name; the closest are "
                f"{closest(f'{path}.weight', self.reader)}: take the module out of the targets, or save the model "
                "with transformers' save_pretrained"
            )
        return name

    def _unit(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], entry: PlanEntry | None) -> StoredTensor:
        if entry is not None:
            expected = tuple(self.model.get_parameter(f"{entry.path}.weight").shape)
            if dtype.is_floating_point and dtype.itemsize < 2:
                raise StorageError(
                    f"{name}: expected a weight in 16 or 32 bits, found {dtype}, whose values are commonly those of "
                    "other tensors beside it as well; convert the checkpoint to bfloat16 first"
                )
            if shape != expected or not dtype.is_floating_point:
                raise StorageError(
                    f"{name}: expected a floating-point tensor of shape {expected} as config.json says, found "
                    f"{dtype} {shape}; the shards belong to another model, or are quantized already"
                )
            self.dtypes[entry.path] = dtype
        return StoredTensor(name, shape, prod(shape) * dtype.itemsize, entry)


def _split(model: nn.Module, config: LoraConfig, plan: Plan) -> tuple[Plan, tuple[PlanEntry, ...], dict[str, str]]:
    """What is planned for ``model``: what is quantized, what stays dense, and why that does."""
    options = config.loftq_config if isinstance(config.loftq_config, LoftQConfig) else LoftQConfig()
    dense = kept_dense(model, options)
    kept = tuple(entry for entry in plan.entries if entry.path in dense and entry.codec in DENSE_LINEARS)
    left = tuple(entry for entry in plan.entries if entry not in kept)
    if not left:
        raise TargetError(
            f"{kept[0].path}: expected a module that few bits can hold, found none among the targets "
            f"({dense[kept[0].path]}); target others too"
        )
    return replace(plan, entries=left), kept, {entry.path: dense[entry.path] for entry in kept}
