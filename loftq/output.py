"""What the output of a streamed run is called, how large it will be, and how its config describes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qlora_kit.codecs.codebooks import SCHEMES
from qlora_kit.codecs.packing import packed_bytes
from qlora_kit.config import LoftQConfig
from qlora_kit.inject import PlanEntry
from qlora_kit.loftq_config import DEFAULT_TYPES
from qlora_kit.quantize import in_bitsandbytes

from .checkpoint import Checkpoint

# Every name that some storage has beside a module's weight, for the room that a header may need.
_SUFFIXES = (
    *("weight", "SCB", "weight_format", "scales", "scales_absmax", "scales_offset"),
    *("shifts", "shifts_absmax", "shifts_offset", "codebook", "weight.absmax", "weight.quant_map"),
    *("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_state.bitsandbytes__nf4"),
)


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
            yield from (unit.name.removesuffix("weight") + suffix for suffix in _SUFFIXES)


def expected_bytes(checkpoint: Checkpoint, options: LoftQConfig) -> int:
    """Bytes of the output, to a few per mille."""
    kind = options.quant_type or DEFAULT_TYPES[options.loftq_bits]
    total = 0
    for unit in checkpoint.units:
        if unit.entry is None or unit.entry.family == "embedding":
            total += unit.nbytes
        else:
            total += packed_bytes(unit.numel, options.loftq_bits)
            blocksize = unit.shape[-1] if kind == "int8" or options.blocksize == "row" else int(options.blocksize)
            a_scale = (1 if options.double_quant else 4) * (2 if kind.startswith("affine") else 1)
            total += a_scale * -(-unit.numel // blocksize)
        if unit.entry is not None:
            total += 4 * unit.entry.trainable_parameters
    return total


def quantization_config(checkpoint: Checkpoint, options: LoftQConfig) -> dict[str, Any] | None:
    """What ``from_pretrained`` has to know of the output's linear layers; None if only embeddings are targeted."""
    from qlora_kit.hf_quantizer import PackedConfig, bitsandbytes_config, skipped_modules

    linears = [entry for entry in checkpoint.plan.entries if entry.family == "linear"]
    if not linears:
        return None
    paths = [path for entry in linears for path in (entry.path, *entry.aliases)]
    kind = options.quant_type or DEFAULT_TYPES[options.loftq_bits]
    if in_bitsandbytes(kind, options.blocksize):
        dtype = checkpoint.dtypes[linears[0].path]
        skip = skipped_modules(checkpoint.model, set(paths))
        config = bitsandbytes_config(kind, dtype, skip, double_quant=options.double_quant)
    else:
        assert kind in SCHEMES
        blocksize = None if options.blocksize == "row" else options.blocksize
        group = {"quant_type": kind, "blocksize": blocksize, "double_quant": options.double_quant, "modules": paths}
        config = PackedConfig([group])
    return config.to_dict()
