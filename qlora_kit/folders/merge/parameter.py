"""One parameter of a merge on disk: from what is read, and what adapters change of it, to the tensors that are written.

It is the arithmetic of a merge in memory, by the same functions: the codec reads a float32 weight, all deltas are added
at once, and one write puts the result into the storage asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...checkpoints.stored_model import holding, widened
from ...codecs import codec_for, find_codec
from ...codecs.quantized import Quantizer
from ...errors import CodecError, ConfigError, MergeError
from ...merging.fidelity import LayerFidelity, add_delta_, check_finite, checked_cast, compare, norms_of
from ...merging.requantize import rounded
from ...training.preparation.quantize import linear_holding
from .plan import MergePlan, OutputParameter


@dataclass
class MergedParameter:
    """What a parameter became: tensors by their names in the output, and the account of a merged layer."""

    tensors: dict[str, Tensor]
    row: LayerFidelity | None = None


@torch.no_grad()
def merged_parameter(
    plan: MergePlan, unit: OutputParameter, tensors: Mapping[str, Tensor], device: str = "cpu"
) -> MergedParameter:
    """The result of ``unit``.

    Args:
        tensors: what ``unit.reads`` names, by the names in the module.

    Raises:
        MergeError: a value is or becomes NaN or infinite; names the module.
    """
    if unit.to is None:
        single = len(tensors) == 1
        return MergedParameter({unit.name if single else unit.stem + part: tensor for part, tensor in tensors.items()})
    change = unit.change
    one = change.value if change.value is not None else tensors["weight"] if len(tensors) == 1 else None
    if not change.branches and one is not None and isinstance(unit.to, torch.dtype):
        return MergedParameter({unit.name: checked_cast(unit.name, widened(one), unit.to)})
    try:
        return _merged(plan, unit, {name: tensor.to(device) for name, tensor in tensors.items()}, device)
    except (CodecError, ConfigError) as error:
        raise MergeError(f"{unit.path}: {error}") from error


def _merged(plan: MergePlan, unit: OutputParameter, tensors: Mapping[str, Tensor], device: str) -> MergedParameter:
    base, change = plan.base, unit.change
    assert unit.place is not None
    module = base.module(unit.place, tensors) if tensors else None
    value = module if change.value is None else holding(base.modules[unit.path], widened(change.value).to(device))
    assert value is not None
    weight = codec_for(value, unit.path).read(value)
    delta = norms = None
    if change.branches:
        A, B = change.stacked()
        delta = A.to(device), B.to(device)
        norms = norms_of(weight, *delta)
        add_delta_(weight, *delta, unit.path)
    else:
        check_finite(unit.path, weight)
    stored = _written(plan, unit, module or value, weight)
    codec = codec_for(stored, unit.path)
    row = None
    if delta is not None and norms is not None:
        row = compare(unit.path, codec.name, weight, delta, norms, codec.pieces(stored))
    state = stored.state_dict() if isinstance(unit.to, Quantizer) else {"weight": stored.weight.detach()}  # type: ignore[operator]
    made = MergedParameter({unit.stem + name: tensor for name, tensor in state.items()}, row)
    # A 4-bit weight and its module refer to each other, and would wait for the garbage collector, which counts
    # objects and not their megabytes.
    for used in {id(m): m for m in (module, value, stored) if m is not None}.values():
        vars(used).clear()
    return made


def _written(plan: MergePlan, unit: OutputParameter, module: nn.Module, ideal: Tensor) -> nn.Module:
    """A module that holds float32 (out, in) ``ideal`` as ``unit`` says; ``module`` is what is stored now."""
    if isinstance(unit.to, torch.dtype):
        own = plan.base.modules[unit.path]
        dense = holding(own, torch.empty(unit.shape, dtype=unit.to, device=ideal.device))
        codec_for(dense, unit.path).write_(dense, ideal)
        return dense
    assert unit.to is not None
    codec, way = find_codec(module), plan.task.rounding
    if codec is None or codec.quantizer(module) != unit.to:
        return linear_holding(module, rounded(ideal, unit.to, way).quantized)
    if way == "nearest":
        codec.write_(module, ideal)
    else:
        codec.take_(module, rounded(ideal, unit.to, way).quantized)
    return module
