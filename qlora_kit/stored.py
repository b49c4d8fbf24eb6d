"""The weight of a stored quantized module, read from its tensors in a checkpoint without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .codecs import codec_for
from .codecs.packed import PackedLinear
from .errors import StorageError
from .shards import ShardReader


def read_stored(
    folder: Path, reader: ShardReader, stem: str, shape: tuple[int, int], kind: str, options: Mapping[str, Any]
) -> Tensor:
    """float32 (out, in): what the tensors whose names begin with ``stem`` say; see ``weight_of``."""
    tensors = {name.removeprefix(stem): reader.tensor(name) for name in reader if name.startswith(stem)}
    return weight_of(tensors, shape, kind, options, f"{folder}: {stem}")


def weight_of(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], kind: str, options: Mapping[str, Any], where: str
) -> Tensor:
    """float32 (out, in): what the state of one module says.

    Args:
        tensors: by their names in the module.
        kind: the type that packed codes are of.
        options: how the weights were quantized: "blocksize" and "double_quant".
        where: begins messages.

    Raises:
        StorageError: the tensors aren't of a storage known here.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    out_features, in_features = shape
    weight = tensors["weight"]
    if weight.is_floating_point():  # an embedding's, which is stored (in, out)
        return weight.float().T
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
        return codec_for(packed).read(packed)
    from .codecs.bnb import linear_from_tensors

    module: nn.Module | None = linear_from_tensors(tensors, in_features, out_features)
    if module is None:
        raise StorageError(f"{where}weight: expected a storage known here, found {sorted(tensors)}")
    with torch.no_grad():
        return codec_for(module).read(module)
