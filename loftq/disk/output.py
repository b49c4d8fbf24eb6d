"""What the output of a streamed run is called, how large it will be, and how its config describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.adapter_files.folder import PREFIX
from qlora_kit.checkpoints.quantized_tensors import PARTS
from qlora_kit.config.lora import LoftQConfig
from qlora_kit.injection.engine import PlanEntry
from qlora_kit.training.preparation.quantize import in_bitsandbytes

from ..starts.options import module_bytes, storage_of
from .checkpoint import Checkpoint, StoredTensor


def adapter_names(entry: PlanEntry) -> tuple[str, str]:
    """The names of a module's two factors, without the prefix of adapter files."""
    if entry.family == "embedding":
        return f"{entry.path}.lora_embedding_A", f"{entry.path}.lora_embedding_B"
    return f"{entry.path}.lora_A.weight", f"{entry.path}.lora_B.weight"


def base_names(unit: StoredTensor) -> Iterator[str]:
    """All names that the output's base may hold of ``unit``."""
    yield unit.name
    if unit.entry is not None:
        yield from (unit.name.removesuffix("weight") + part for part in PARTS)


def adapter_keys(unit: StoredTensor) -> Iterator[str]:
    """The keys of the adapter's file that come of ``unit``."""
    if (adapted := unit.entry or unit.kept) is not None:
        yield from (PREFIX + name for name in adapter_names(adapted))
    if unit.copied_as is not None:
        yield unit.copied_as


def expected_bytes(checkpoint: Checkpoint, options: LoftQConfig) -> int:
    """Bytes of the output, to a few per mille."""
    total = 0
    for unit in checkpoint.units:
        if unit.entry is None or unit.entry.family == "embedding":
            total += unit.nbytes
        else:
            total += module_bytes(unit.shape, storage_of(unit.entry.path, options)[0], options)
        if (adapted := unit.entry or unit.kept) is not None:
            total += 4 * adapted.trainable_parameters
        if unit.copied_as is not None:
            total += 4 * unit.numel
    return total


def quantization_config(checkpoint: Checkpoint, options: LoftQConfig) -> dict[str, Any] | None:
    """What ``from_pretrained`` has to know of the output's linear layers; None if only embeddings are targeted."""
    from qlora_kit.hf_quantizer import Stored, storage_config

    linears = [entry for entry in checkpoint.plan.entries if entry.family == "linear"]
    if not linears:
        return None
    stored: dict[str, Stored] = {}
    for entry in linears:
        kind, packed = storage_of(entry.path, options)
        by_bitsandbytes = not packed and in_bitsandbytes(kind, options.blocksize)
        blocksize = None if options.blocksize == "row" or kind == "int8" else int(options.blocksize)
        own = Stored(kind, blocksize, options.double_quant, by_bitsandbytes)
        stored |= dict.fromkeys((entry.path, *entry.aliases), own)
    return dict(storage_config(checkpoint.model, stored, checkpoint.dtypes[linears[0].path]).to_dict())
