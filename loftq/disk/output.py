"""What the output of a streamed run is called, how large it will be, and how its config describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.checkpoints.quantized_tensors import PARTS
from qlora_kit.config.lora import LoftQConfig
from qlora_kit.injection.engine import PlanEntry
from qlora_kit.preparation.quantize import in_bitsandbytes

from ..starts.options import module_bytes, storage_of
from .checkpoint import Checkpoint


def adapter_names(entry: PlanEntry) -> tuple[str, str]:
    """The names of a module's two factors, without the prefix of adapter files."""
    if entry.family == "embedding":
        return f"{entry.path}.lora_embedding_A", f"{entry.path}.lora_embedding_B"
    return f"{entry.path}.lora_A.weight", f"{entry.path}.lora_B.weight"


def stored_names(checkpoint: Checkpoint) -> Iterator[str]:
    """All names that the output's base may hold."""
    for unit in checkpoint.units:
        if unit.entry is None:
            yield unit.name
        else:
            yield from (unit.name.removesuffix("weight") + suffix for suffix in ("weight", *PARTS))


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
