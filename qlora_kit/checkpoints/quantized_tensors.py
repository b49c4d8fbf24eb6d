"""A stored quantized module, or its weight alone, from its tensors in a checkpoint without building the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import codec_for
from ..codecs.codebooks import scheme
from ..codecs.packed import PackedLinear
from ..codecs.packing import packed_bytes
from ..codecs.quantized import SCALES_BLOCKSIZE
from ..errors import StorageError
from .shards import ShardReader

# What quantized modules keep beside ``weight``, by its name in the module.
PARTS = (
    *("SCB", "weight_format", "scales", "scales_absmax", "scales_offset"),
    *("shifts", "shifts_absmax", "shifts_offset", "codebook", "weight.absmax", "weight.quant_map"),
    *("weight.nested_absmax", "weight.nested_quant_map"),
    *(f"weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")),
)


def read_weight(
    folder: Path, reader: ShardReader, stem: str, shape: tuple[int, int], kind: str, options: Mapping[str, Any]
) -> Tensor:
    """float32 (out, in): what the tensors whose names begin with ``stem`` say; see ``weight_of``."""
    tensors = {name.removeprefix(stem): reader.tensor(name) for name in reader if name.startswith(stem)}
    return weight_of(tensors, shape, kind, options, f"{folder}: {stem}")


def weight_of(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], kind: str, options: Mapping[str, Any], where: str
) -> Tensor:
    """float32 (out, in): what the state of one module says; arguments and errors as for ``module_of``."""
    weight = tensors["weight"]
    if weight.is_floating_point() and set(tensors) <= {"weight", "bias"}:  # an embedding's, which is stored (in, out)
        return weight.float().T
    module = module_of(tensors, shape, kind, options, where)
    with torch.no_grad():
        return codec_for(module).read(module)


def module_of(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], kind: str, options: Mapping[str, Any], where: str
) -> nn.Module:
    """The quantized linear layer, without its bias, whose state ``tensors`` are.

    Args:
        tensors: by their names in the module.
        shape: (out, in).
        kind: the type that packed codes are of.
        options: how the weights were quantized: "blocksize" and "double_quant".
        where: begins messages.

    Raises:
        StorageError: the tensors aren't of a storage known here.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    try:
        module = _filled(tensors, shape, kind, options)
    except Exception as error:  # bitsandbytes' and torch's of any kind, of tensors that aren't there, or aren't these
        raise StorageError(
            f"{where}weight: expected all tensors of a quantized weight, found {sorted(tensors)} ({error!r}); download "
            "or save the checkpoint again"
        ) from error
    if module is None:
        raise StorageError(f"{where}weight: expected a storage known here, found {sorted(tensors)}")
    return module


def _filled(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], kind: str, options: Mapping[str, Any]
) -> nn.Module | None:
    out_features, in_features = shape
    if "codebook" in tensors:
        blocksize = in_features if options["blocksize"] == "row" else options["blocksize"]
        packed = PackedLinear(
            in_features,
            out_features,
            bias=False,
            quant_type=kind,
            blocksize=blocksize,
            double_quant=options["double_quant"],
            device="meta",
        )
        packed.load_state_dict(tensors, strict=True, assign=True)
        return packed
    from ..codecs.bnb import linear_from_tensors

    return linear_from_tensors(tensors, in_features, out_features)


def packing_of(quantization: Mapping[str, Any] | None, holds: Callable[[str], bool]) -> tuple[str, dict[str, Any]]:
    """Type and options of a packed module, for ``module_of``; bitsandbytes' modules say theirs in their own tensors.

    Args:
        quantization: config.json's ``quantization_config``.
        holds: whether a path in it is the module's.
    """
    for group in (quantization or {}).get("groups", ()):
        if any(holds(path) for path in group["modules"]):
            blocksize = "row" if group["blocksize"] is None else group["blocksize"]
            return group["quant_type"], {"blocksize": blocksize, "double_quant": group["double_quant"]}
    return "", {"blocksize": "row", "double_quant": False}


def weight_bytes(shape: tuple[int, ...], kind: str, blocksize: int | None, double_quant: bool) -> int:
    """Bytes of a weight (out, in) in the type ``kind``: codes, scales and table, exactly so in ``PackedLinear``.

    Args:
        blocksize: None for rows.
    """
    count, bits = prod(shape), int(kind[-1])
    low = None if kind == "int8" else scheme(kind)
    blocks = -(-count // (shape[-1] if low is None else low.blocksize(blocksize, shape[-1])))
    scales = blocks + 4 * (-(-blocks // SCALES_BLOCKSIZE) + 1) if double_quant else 4 * blocks
    table = 0 if low is None else 4 * 2**low.memory
    return packed_bytes(count, bits) + scales * (2 if kind.startswith("affine") else 1) + table
