"""The 16-bit weight that a quantized module was made from, found in a checkpoint and read alone."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ..errors import StorageError, closest
from .model_folder import read_settings, skeleton
from .shards import ShardReader
from .stored_names import StoredNames


def original_weight(folder: str | os.PathLike[str], path: str, stored: Tensor) -> Tensor:
    """The weight that ``stored`` (float32 (out, in)) was quantized from: float32 (out, in) on its device.

    ``folder`` may be one file of safetensors, or the index of several, too.

    Its name is looked for among those of the model that the folder's config.json describes. Without such a config, or
    where that model has no such path, it is ``<path>.weight`` in a checkpoint of the whole model or of the model
    without or inside its head. A matrix that was stored transposed (transformers' Conv1D) is told by its shape, a
    square one by which orientation is closer.

    Raises:
        StorageError: no tensor of the names tried, one of another shape, or one that is farther from
            ``stored`` than a zero matrix is.
    """
    reader, names = _opened(Path(folder))
    name = (names and names.weight_of(path)) or _plain_name(reader, path)
    full = reader.tensor(name).to(stored.device, torch.float32)
    candidates = [matrix for matrix in (full, full.mT) if matrix.shape == stored.shape] if full.dim() == 2 else []
    if not candidates:
        raise StorageError(
            f"{path}: expected a weight of shape {tuple(stored.shape)} in {folder}, found {name!r} of shape "
            f"{tuple(full.shape)}; pass the folder of the model that was quantized"
        )
    closer = min(candidates, key=lambda matrix: float((matrix - stored).norm()))
    distance, size = float((closer - stored).norm()), float(closer.norm())
    if distance > size:
        raise StorageError(
            f"{path}: expected {name!r} in {folder} to be the weight that the module was quantized from, found one "
            f"at a relative distance of {distance / (size or 1.0):.2f}; pass the folder of the same model"
        )
    return closer.contiguous()


def _plain_name(reader: ShardReader, path: str) -> str:
    whole = f"{path}.weight"
    tried = [whole, f"model.{whole}", whole.partition(".")[2] if "." in path else whole]
    for name in tried:
        if name in reader:
            return name
    nested = [name for name in reader if name.endswith(f".{whole}")]
    if len(nested) == 1:
        return nested[0]
    raise StorageError(
        f"{path}: expected its 16-bit weight in {reader.folder}, found none of the names tried "
        f"({', '.join(dict.fromkeys(tried))}, and one that ends in .{whole}, of which there are {len(nested)}); "
        f"the closest are {closest(whole, reader)}; pass the folder of the same model"
    )


def _opened(folder: Path) -> tuple[ShardReader, StoredNames | None]:
    # Both are read once for all modules of a model, and again when the folder has changed.
    return _opened_once(folder, folder.stat().st_mtime_ns if folder.exists() else 0)


@lru_cache(maxsize=1)
def _opened_once(folder: Path, changed: int) -> tuple[ShardReader, StoredNames | None]:
    reader = ShardReader.at(folder)
    folder = reader.folder
    if not (folder / "config.json").exists() or "auto_map" in read_settings(folder):
        return reader, None  # no model of transformers' own
    return reader, StoredNames(skeleton(folder, quantized=True), reader)
