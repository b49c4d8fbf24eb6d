"""Is what a merge on disk wrote what it should have written? Read back from the shards, before config.json appears.

Names, shapes and dtypes of all tensors are compared with the plan, and with the model that the new config.json builds;
and some tensors, evenly chosen among those that were merged and those that weren't, are made again from the sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.checksums import check_tensors, checksums_in
from ...checkpoints.model_folder import skeleton
from ...checkpoints.shards import FORMAT_NAMES, ShardReader
from ...checkpoints.stored_names import tied_groups
from ...codecs import codec_for
from ...codecs.quantized import Quantizer
from ...errors import StorageError
from .parameter import merged_parameter
from .plan import MergePlan, OutputParameter

# Of merged tensors and of others each.
SAMPLES = 4
# Another number of threads adds in another order: the last bit of a sum, and through it a code, may differ.
_ULPS = 2.0
_CODES = 1e-3


def verify_output(
    plan: MergePlan, out: Path, config_folder: Path, lines: Sequence[Mapping[str, Any]], device: str
) -> int:
    """Check the shards in ``out``; how many tensors were made again.

    Args:
        config_folder: holds the output's config.json.
        lines: the journal's, which say what was written.

    Raises:
        StorageError: something doesn't hold; says what.
    """
    reader = ShardReader(out)
    written = {name: entry for line in lines for name, entry in line["base"].items()}
    if set(written) != set(reader):
        odd = sorted(set(written) ^ set(reader))
        raise StorageError(
            f"{out}: expected the {len(written)} tensors that were written, found a difference in {odd[:5]}"
        )
    if len(known := checksums_in(written)) == len(written):
        check_tensors(reader, known, fix="the disk or the memory is faulty: remove the output and merge again")
    types = reader.types()
    if lacking := [unit.name for unit in plan.units if unit.name not in types]:
        raise StorageError(
            f"{out}: expected a tensor {lacking[0]!r}, found none: the journal names others; remove the output and "
            "merge again"
        )
    for name, entry in written.items():
        dtype, shape = types[name]
        if (list(shape), FORMAT_NAMES[dtype]) != (entry["shape"], entry["dtype"]):
            raise StorageError(
                f"{out}: {name}: expected shape {entry['shape']} of {entry['dtype']}, found {list(shape)} of {dtype}"
            )
    _check_model(plan, out, config_folder, types)
    sample = _sample(plan.units)
    for unit in sample:
        _check_unit(plan, unit, reader, device)
    return len(sample)


def _check_model(plan: MergePlan, out: Path, config_folder: Path, types: Mapping[str, Any]) -> None:
    """Compare what is written with what the new config builds."""
    model = skeleton(config_folder, quantized=True)
    known = plan.base.names.known
    missing_before = {name for name in known.values() if name not in plan.base.names.stored}
    tied = {name: group for group in tied_groups(model, known) for name in group}
    written = {unit.place: types[unit.name] for unit in plan.units if unit.place is not None}
    changed = {name for group in plan.untied for name in group}
    for name, tensor in model.state_dict().items():
        own = known.get(name, name)
        if own in changed and own in tied and changed & (set(tied[own]) - {own}):
            raise StorageError(
                f"{own}: expected parameters that the config can untie, found {tied[own]} tied whatever it says; take "
                "the tied modules out of the adapter's targets"
            )
        if own not in written:
            if own not in missing_before and not any(other in written for other in tied.get(own, ())):
                raise StorageError(f"{out}: expected a tensor {own!r} as {type(model).__name__} has, found none")
        elif own.rpartition(".")[0] not in plan.quantized and written[own][1] != tuple(tensor.shape):
            raise StorageError(
                f"{out}: {own}: expected shape {tuple(tensor.shape)} as config.json says, found {written[own][1]}"
            )


def _sample(units: Sequence[OutputParameter]) -> list[OutputParameter]:
    merged = [unit for unit in units if unit.change.branches or unit.change.value is not None]
    others = [unit for unit in units if not (unit.change.branches or unit.change.value is not None)]
    return [unit for group in (merged, others) for unit in group[:: max(1, len(group) // SAMPLES)][:SAMPLES]]


def _check_unit(plan: MergePlan, unit: OutputParameter, reader: ShardReader, device: str) -> None:
    tensors = {part: plan.base.reader.tensor(name) for part, name in unit.reads.items()}
    expected = {name: tensor.cpu() for name, tensor in merged_parameter(plan, unit, tensors, device).tensors.items()}
    found = {name: reader.tensor(name) for name in expected}
    if all(_same(found[name], tensor) for name, tensor in expected.items()):
        return
    if isinstance(unit.to, Quantizer) and len(expected) > 1:
        first, second = (_dequantized(plan, unit, state) for state in (expected, found))
        if float((first - second).norm()) <= _CODES * float(first.norm()):
            return
    elif len(expected) == 1 and _close(*found.values(), *expected.values()):
        return
    raise StorageError(
        f"{reader.folder}: {unit.name}: expected what the base and the adapters give, found other values; the disk or "
        "the memory is faulty, or a source was changed meanwhile: remove the output and merge again"
    )


def _dequantized(plan: MergePlan, unit: OutputParameter, state: Mapping[str, Tensor]) -> Tensor:
    from ...checkpoints.quantized_tensors import module_of

    assert isinstance(unit.to, Quantizer)
    shape = codec_for(plan.base.modules[unit.path]).shape(plan.base.modules[unit.path])
    options = {"blocksize": unit.to.blocksize or "row", "double_quant": unit.to.double_quant}
    parts = {name.removeprefix(unit.stem): tensor for name, tensor in state.items()}
    module = module_of(parts, shape, unit.to.quant_type, options, unit.stem)
    return codec_for(module).read(module)


def _same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, whatever the bits mean."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return torch.equal(*flat)


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.dtype != expected.dtype or found.shape != expected.shape or not found.is_floating_point():
        return False
    allowed = expected.float().abs() * (_ULPS * torch.finfo(found.dtype).eps)
    return bool(((found.float() - expected.float()).abs() <= allowed).all())
