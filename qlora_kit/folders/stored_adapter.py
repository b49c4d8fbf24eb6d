"""A stored adapter, read without the model that it belongs to: its branches by path, and what else its file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_files.backbone import METADATA_KEY
from ..adapter_files.combined_config import holder_of
from ..adapter_files.folder import PREFIX, WEIGHTS_NAME, read_adapter, read_metadata
from ..adapter_files.keys import factor
from ..config.lora import CONFIG_NAME, LoraConfig
from ..errors import AdapterError, StorageError
from ..lowrank.algebra import Branch
from ..naming import Patterns


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
    config = _with_tied_copies(config, state)
    stored = StoredAdapter(Path(folder), config, read_metadata(folder).get(METADATA_KEY))
    sides: dict[str, dict[str, str]] = {}
    for key in _once(state):
        branch = factor(key.removeprefix(PREFIX))
        if branch is None:
            stored.rest[key] = state[key]
        else:
            sides.setdefault(branch.path, {})[branch.side] = key
    ranks, alphas = Patterns(config.rank_pattern), Patterns(config.alpha_pattern)
    for path, found in sides.items():
        if found.keys() != {"A", "B"}:
            raise StorageError(
                f"{folder}: expected factors A and B of {path}, found only {list(found.values())}; save it again"
            )
        A, B = (_widened(state[found[side]]) for side in "AB")
        rank = ranks.value(path, config.r)
        if min(A.dim(), B.dim()) < 2 or A.shape[0] != rank or B.flatten(1).shape[1] != rank:
            raise StorageError(
                f"{folder}: expected factors of rank {rank} for {path}, as its config says, found {tuple(A.shape)} and "
                f"{tuple(B.shape)}; the config and the weights aren't of one adapter, so save it again"
            )
        scaling = config.scaling_of(rank, alphas.value(path, config.lora_alpha))
        stored.branches[path] = Branch(A.flatten(1), B.flatten(1), scaling)
        stored.keys[path] = found["A"], found["B"]
        stored.shapes[path] = A.shape, B.shape
    if not sides:
        raise StorageError(
            f"{folder}: expected low-rank factors, found none among {sorted(state)[:3]}; pass an adapter"
        )
    return stored


def _with_tied_copies(config: LoraConfig, state: Mapping[str, Tensor]) -> LoraConfig:
    """``config``, also naming in ``modules_to_save`` what shares a trained copy by ``ensure_weight_tying``: PEFT's
    files name only the one whose copy it is, and hold both."""
    if not config.ensure_weight_tying or not config.modules_to_save:
        return config
    weights = {key.removeprefix(PREFIX).removesuffix(".weight"): state[key] for key in state if _is_weight(key)}
    held = [path for path in weights if holder_of(path, config)]
    tied = [
        path
        for path, weight in weights.items()
        if path not in held and any(torch.equal(weight, weights[other]) for other in held)
    ]
    return replace(config, modules_to_save=[*config.modules_to_save, *tied]) if tied else config


def _once(state: Mapping[str, Tensor]) -> list[str]:
    """The keys, each parameter's once: PEFT may store a trained copy under two names, and beside it the table of the
    base that it stands for."""
    first: dict[str, str] = {}
    kept = []
    for key in sorted(state, key=lambda key: (".original_module." in key, len(key))):
        other = first.setdefault(parameter_name(key), key)
        if other == key or not (".original_module." in key or torch.equal(state[key], state[other])):
            kept.append(key)
    return sorted(kept)


def _is_weight(key: str) -> bool:
    return key.endswith(".weight") and factor(key) is None and ".base_layer." not in key


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
