"""A stored adapter, read without the model that it belongs to: its branches by path, and what else its file holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_files.backbone import METADATA_KEY
from ..adapter_files.folder import PREFIX, WEIGHTS_NAME, read_adapter, read_metadata
from ..algebra import Branch
from ..config.lora import CONFIG_NAME, LoraConfig
from ..errors import AdapterError, StorageError
from ..naming import pattern_value

_FACTOR = re.compile(
    re.escape(PREFIX) + r"(?P<path>.+)\.(?P<kind>lora_(?:embedding_)?)(?P<side>[AB])(?P<end>\.weight)?"
)


@dataclass
class StoredAdapter:
    """An adapter's folder, read: its branches by path, and the rest.

    Attributes:
        shapes: those of A and B in the file, by path; convolutions have more than two dimensions.
        rest: tensors other than factors, by key.
    """

    folder: Path
    config: LoraConfig
    backbone: str | None
    branches: dict[str, Branch] = field(default_factory=dict)
    keys: dict[str, tuple[str, str]] = field(default_factory=dict)
    shapes: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    rest: dict[str, Tensor] = field(default_factory=dict)


def read_stored_adapter(folder: str | Path, *, allow_pickle: bool = False) -> StoredAdapter:
    """Read an adapter's folder.

    Raises:
        StorageError: see ``read_adapter``; or a factor without its other half, or of another
            rank than the config says.
    """
    config, state = read_adapter(folder, allow_pickle=allow_pickle, check_finite=False)
    stored = StoredAdapter(Path(folder), config, read_metadata(folder).get(METADATA_KEY))
    sides: dict[str, dict[str, str]] = {}
    for key in sorted(state):
        match = _FACTOR.fullmatch(key)
        if match is None or (match["kind"] == "lora_") != (match["end"] is not None):
            stored.rest[key] = state[key]
        else:
            sides.setdefault(match["path"], {})[match["side"]] = key
    for path, found in sides.items():
        if found.keys() != {"A", "B"}:
            raise StorageError(
                f"{folder}: expected factors A and B of {path}, found only {list(found.values())}; save it again"
            )
        A, B = (_widened(state[found[side]]) for side in "AB")
        rank = pattern_value(path, config.rank_pattern, config.r)
        if min(A.dim(), B.dim()) < 2 or A.shape[0] != rank or B.flatten(1).shape[1] != rank:
            raise StorageError(
                f"{folder}: expected factors of rank {rank} for {path}, as its config says, found {tuple(A.shape)} and "
                f"{tuple(B.shape)}; the config and the weights aren't of one adapter, so save it again"
            )
        scaling = config.scaling_of(rank, pattern_value(path, config.alpha_pattern, config.lora_alpha))
        stored.branches[path] = Branch(A.flatten(1), B.flatten(1), scaling)
        stored.keys[path] = found["A"], found["B"]
        stored.shapes[path] = A.shape, B.shape
    if not sides:
        raise StorageError(
            f"{folder}: expected low-rank factors, found none among {sorted(state)[:3]}; pass an adapter"
        )
    return stored


def _widened(factor: Tensor) -> Tensor:
    """``factor``; a float8 one in float32, since torch computes in nothing so narrow."""
    return factor.float() if factor.element_size() == 1 else factor


def check_once(folders: Sequence[str | Path]) -> None:
    """Refuse one adapter that stands several times, however its folder is spelled or linked to.

    Raises:
        AdapterError: names both spellings.
    """
    seen: dict[object, str | Path] = {}
    for folder in folders:
        files = [file for name in (CONFIG_NAME, WEIGHTS_NAME) if (file := Path(folder) / name).exists()]
        same = tuple((file.stat().st_dev, file.stat().st_ino) for file in files)
        if same and same in seen:
            raise AdapterError(
                f"{folder}: expected each adapter once, found it again as {seen[same]}, so its delta would be added "
                "twice; give it the sum of both weights instead"
            )
        seen[same] = folder


def parameter_name(key: str) -> str:
    """The parameter's name behind a key of an adapter's file, those of older releases included."""
    name = key.removeprefix(PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    head, saved, rest = name.partition(".modules_to_save.")
    return f"{head}.{rest.removeprefix('default.')}" if saved else name
