"""From a stored model and what adapters change in it to units of work: what is read, and what is written in its place.

A unit is one tensor of the output, or the several tensors of one quantized weight. Its name is the output's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import nn

from ...checkpoints.quantized_tensors import PARTS, weight_bytes
from ...checkpoints.stored_model import StoredModel, is_float8
from ...codecs import codec_for, find_codec
from ...codecs.quantized import Quantizer
from ...errors import MergeError
from ...injection.read_past import ReadPast
from ...merging.task import MergeTask
from ...training.preparation.quantize import DENSE_LINEARS
from .changes import Change
from .settings import settings_of
from .ties import part, settle


@dataclass(frozen=True)
class OutputParameter:
    """One parameter of the output.

    Attributes:
        name: in the output. place: in the model; None for a tensor that the model doesn't have.
        reads: stored names by their names in the module; empty for what only an adapter has.
        change: what adapters change of it.
        to: the dtype to store it in, or how to quantize it; None leaves it as it is stored.
        shape: of the tensor, as the model has it.
        nbytes: about what it will take.
    """

    name: str
    place: str | None
    reads: dict[str, str]
    change: Change = field(repr=False)
    to: torch.dtype | Quantizer | None
    shape: tuple[int, ...]
    nbytes: int

    @property
    def path(self) -> str:
        """Of the module in the model."""
        return (self.place or self.name).rpartition(".")[0]

    @property
    def stem(self) -> str:
        """What the names of a module's tensors begin with."""
        return self.name.removesuffix("weight")

    def names(self) -> Iterator[str]:
        """All names that the output may have of it."""
        yield self.name
        if isinstance(self.to, Quantizer) or len(self.reads) > 1:
            yield from (self.stem + part for part in PARTS)


class MergePlan:
    """What a merge on disk does.

    Attributes:
        units: in the order of their names.
        quantized: how each quantized module of the output is stored, by path.
        packed: paths of those that stay packed by us, also in a type that bitsandbytes has: what is written into the
            type that it is in goes into the module that it is in.
        untied: groups of names that were one parameter and no longer are.
        settings: the output's config.json.

    Raises:
        MergeError: a branch has no stored weight to go to, or parameters must stay tied that the adapters make differ.
    """

    def __init__(self, base: StoredModel, changes: dict[str, Change], task: MergeTask) -> None:
        self.base, self.task = base, task
        self.quantized: dict[str, Quantizer] = {}
        self.packed: set[str] = set()
        changes, sources = dict(changes), dict(base.names.stored)
        dense, groups = not isinstance(task.target(None, linear=True), Quantizer), base.names.ties()
        self.untied = [group for group in groups if not settle(base, group, changes, sources, dense=dense)]
        for group in groups if self.untied else ():
            part(group, changes, sources)
        self._check_whole(sources, changes)
        for name in base.outgrown:
            if changes.get(name, Change()).value is None:
                rows = base.types[base.names.stored[name]][1][0]
                raise MergeError(
                    f"{name}: expected {base.shapes[name][0]} rows, as an adapter has of another table, found {rows} "
                    f"in {base.folder} and none in an adapter; save the adapter with both tables "
                    "(save_embedding_layers=True), or resize the base first"
                )
        units = [self._unit(name, stored, changes.pop(name, Change())) for name, stored in sources.items()]
        units += [self._only_in_adapter(name, change) for name, change in changes.items()]
        units += [self._foreign(stored) for stored in base.names.foreign]
        self.units = sorted(units, key=lambda unit: unit.name)
        self.settings = settings_of(base, task, self.quantized, self.packed, untied=bool(self.untied))

    def _check_whole(self, sources: dict[str, str], changes: dict[str, Change]) -> None:
        given = [name for name, change in changes.items() if change.value is not None]
        self.base.names.check_whole(self.base.folder, [*sources, *given])

    @property
    def nbytes(self) -> int:
        """About what the output takes on the disk."""
        return sum(unit.nbytes for unit in self.units)

    @cached_property
    def _read_past(self) -> dict[str, str]:
        return ReadPast(self.base.model).dense()

    def _unit(self, name: str, stored: str, change: Change) -> OutputParameter:
        base, dtype = self.base, self.base.types[stored][0]
        source = base.names.name_of(stored) or name  # another than ``name`` where a tied parameter is taken apart
        reads = base.names.parts.get(source, {"weight": stored})
        own = self._own_quantizer(source, reads)
        changed = bool(change.branches) or change.value is not None
        to: torch.dtype | Quantizer | None = self.task.dtype
        if own is not None or (change.branches and self._is_quantizable(name)):
            to = self.task.target(own, linear=True) or to
        if not changed and (to == own or (not dtype.is_floating_point and own is None)):
            to = None
        elif to is None and changed:
            to = dtype
            if is_float8(dtype):
                raise MergeError(
                    f"{name}: expected a weight in 16 or 32 bits, or in a k-bit type, to merge into as it is stored, "
                    f"found {dtype}, which has no scales and would lose most of a delta; merge into 'bfloat16'"
                )
        shape = base.shapes[name]
        kept = own if to is None else to
        if isinstance(kept, Quantizer):
            path = name.rpartition(".")[0]
            self.quantized[path] = kept
            if kept == own and any(part.startswith("scales") for part in reads):
                self.packed.add(path)
            matrix = codec_for(base.modules[path], path).shape(base.modules[path])
            nbytes = weight_bytes(matrix, kept.quant_type, kept.blocksize, kept.double_quant)
        else:
            nbytes = prod(shape) * (kept or dtype).itemsize
        return OutputParameter(base.names.output_name(name), name, reads, change, to, shape, nbytes)

    def _only_in_adapter(self, name: str, change: Change) -> OutputParameter:
        if change.branches or change.value is None:
            raise MergeError(
                f"{name}: expected the weight that an adapter adapts in {self.base.folder}, found no tensor of it; "
                "pass a checkpoint that has it"
            )
        dtype, shape = self.task.dtype or change.value.dtype, self.base.shapes[name]
        return OutputParameter(name, name, {}, change, dtype, shape, prod(shape) * dtype.itemsize)

    def _foreign(self, stored: str) -> OutputParameter:
        dtype, shape = self.base.types[stored]
        to = self.task.dtype if dtype.is_floating_point and dtype.itemsize > 1 else None
        nbytes = prod(shape) * (to or dtype).itemsize
        return OutputParameter(stored, None, {"weight": stored}, Change(), to, shape, nbytes)

    def _own_quantizer(self, name: str, reads: dict[str, str]) -> Quantizer | None:
        """How the weight ``name`` is quantized now; None if it is dense."""
        if len(reads) == 1:
            return None
        module = self.base.module(name, {part: self.base.reader.tensor(stored) for part, stored in reads.items()})
        own = codec_for(module, name).quantizer(module)
        vars(module).clear()  # a 4-bit weight and its module refer to each other
        return own

    def _is_quantizable(self, name: str) -> bool:
        """Whether it is the weight of a linear layer that the model lets be quantized: T5's ``wo`` has to be dense, and
        all else whose weight is read past the layer."""
        path = name.rpartition(".")[0]
        module: nn.Module = self.base.modules[path]
        codec = find_codec(module)
        if codec is None or codec.name not in DENSE_LINEARS or path in self._read_past:
            return False
        from transformers.quantizers.quantizers_utils import should_convert_module

        return should_convert_module(path, list(getattr(self.base.model, "_keep_in_fp32_modules", None) or ()))
