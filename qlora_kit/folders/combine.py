"""Stored adapters combined and compressed from folder to folder, without the model that they belong to.

The factors in a file are all that a combination needs, and it is computed as on a model, layer by layer with the same
functions, so both give the same bits. What the model would know and a file doesn't is checked by what the files say:
that the adapters fit one another in shape, name one base model, and carry one fingerprint if any carries one (see
``adapter_files.backbone``; it covers the adapted modules, so adapters of other targets can't be told to share a base).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_files.backbone import METADATA_KEY
from ..adapter_files.combined_config import check_apart, combined_config, holder_of, rank_fields
from ..adapter_files.folder import PREFIX, read_adapter, read_metadata, write_adapter
from ..algebra import Branch, Combined, CombineReport, Recipe, Weights, combine_layers
from ..config.lora import LoraConfig
from ..errors import AdapterError, ConfigError, StorageError
from ..naming import pattern_value

_FACTOR = re.compile(
    re.escape(PREFIX) + r"(?P<path>.+)\.(?P<kind>lora_(?:embedding_)?)(?P<side>[AB])(?P<end>\.weight)?"
)


@dataclass
class Stored:
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


def read_stored(folder: str | Path, *, allow_pickle: bool = False) -> Stored:
    """Read an adapter for combining.

    Raises:
        StorageError: see ``read_adapter``; or a factor without its other half, or of another
            rank than the config says.
    """
    config, state = read_adapter(folder, allow_pickle=allow_pickle)
    stored = Stored(Path(folder), config, read_metadata(folder).get(METADATA_KEY))
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
        A, B = state[found["A"]], state[found["B"]]
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


def combine_folders(
    folders: Sequence[str | Path],
    weights: Weights,
    out: str | Path,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_clamp: float | None = None,
    energy: float | None = None,
    seed: int = 0,
    check_backbone: bool = True,
    allow_pickle: bool = False,
) -> CombineReport:
    """Combine stored adapters into a new one in ``out``: ``LoraModel.add_weighted_adapter`` on files.

    Its factors are float32 (float64 where a source's are) whatever the sources', its other tensors are copies of the
    one source's that has them. Arguments not named here are as there.

    Args:
        folders: of the adapters. weights: one for each; or those by module.
        check_backbone: refuse adapters that name two base models, or of whose quantized bases it isn't sure that
            they are one. Where it is False, and it isn't sure, the result carries no fingerprint.

    Raises:
        StorageError: a folder holds no adapter, or the adapters aren't of one base model.
        AdapterError, ConfigError: as for ``add_weighted_adapter``. Nothing is written on any error.
    """
    recipe = Recipe(combination_type, svd_rank, density, majority_sign_method, svd_clamp, energy, seed)
    if isinstance(folders, (str, Path)) or not folders:
        raise AdapterError(f"folders: expected a list with at least one adapter's folder, found {folders!r}")
    stored = [read_stored(folder, allow_pickle=allow_pickle) for folder in folders]
    names = [str(folder) for folder in folders]
    paths = sorted({path for one in stored for path in one.branches})
    layers = {path: {i: s.branches[path] for i, s in enumerate(stored) if path in s.branches} for path in paths}
    check_apart({name: one.config for name, one in zip(names, stored, strict=True)}, paths)
    for path in paths:
        _check_same_module(path, [one for one in stored if path in one.shapes])
    backbone = _common_backbone(stored, check_backbone)
    rest, copied = _copies(stored)
    results, report = combine_layers(layers, names, weights, recipe)
    report.copied.update(copied)
    config = combined_config([one.config for one in stored], {path: r.rank for path, r in results.items()})
    sources = {path: next(one for one in stored if path in one.keys) for path in paths}
    state = {key: value for path in paths for key, value in _as_stored(path, results[path], sources[path]).items()}
    write_adapter(Path(out), config.as_stored(), {**state, **rest}, {METADATA_KEY: backbone} if backbone else None)
    return report


def compress_folder(
    folder: str | Path,
    out: str | Path,
    rank: int | None = None,
    *,
    energy: float | None = None,
    allow_pickle: bool = False,
) -> CombineReport:
    """Write the adapter in ``folder`` with lower ranks into ``out``: in each module the best approximation there is.

    All that isn't a factor (biases, whole modules, the fingerprint of the base) stays as it is.

    Args:
        rank: of every module, where it isn't lower already. energy: in its place, a share in (0, 1]: each module gets
            the smallest rank that keeps it.

    Returns:
        Each module's rank and the error that it costs; a table when printed.

    Raises:
        ConfigError: neither or both of ``rank`` and ``energy`` are given, or out of range.
        StorageError, AdapterError: there is no adapter, or it holds NaN. Nothing is written on any error.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"rank, energy: expected one of the two, found {rank!r} and {energy!r}; pass rank=8, say")
    recipe = Recipe("svd", rank=rank, energy=energy)
    stored = read_stored(folder, allow_pickle=allow_pickle)
    layers = {path: {0: branch} for path, branch in stored.branches.items()}
    results, report = combine_layers(layers, [str(folder)], [1.0], recipe)
    config = dataclasses.replace(stored.config, **rank_fields({path: r.rank for path, r in results.items()}))
    state = {key: t for path, found in results.items() for key, t in _as_stored(path, found, stored).items()}
    metadata = {METADATA_KEY: stored.backbone} if stored.backbone else None
    write_adapter(Path(out), config.as_stored(), {**state, **stored.rest}, metadata)
    return report


def _as_stored(path: str, found: Combined, source: Stored) -> dict[str, Tensor]:
    """The factors under the keys and in the shapes of the file of ``source``, which has this module."""
    (key_A, key_B), (shape_A, shape_B) = source.keys[path], source.shapes[path]
    return {
        key_A: found.A.reshape(found.rank, *shape_A[1:]).contiguous(),
        key_B: found.B.reshape(shape_B[0], found.rank, *shape_B[2:]).contiguous(),
    }


def _check_same_module(path: str, stored: Sequence[Stored]) -> None:
    """Refuse adapters whose factors at ``path`` can't be of one module."""
    kinds = {str(s.folder): (s.keys[path][0].rpartition(path)[2], *s.shapes[path][0][1:]) for s in stored}
    outs = {str(s.folder): s.shapes[path][1][0] for s in stored}
    for found in (kinds, outs):
        if len(set(found.values())) > 1:
            raise StorageError(
                f"{path}: expected adapters of one module, with factors of one kind and size, found {found}; combine "
                "adapters of the same base model"
            )


def _common_backbone(stored: Sequence[Stored], check: bool) -> str | None:
    """The fingerprint of the base that all of ``stored`` belong to, if they carry one."""
    names = {str(s.folder): s.config.base_model_name_or_path for s in stored if s.config.base_model_name_or_path}
    if check and len(set(names.values())) > 1:
        raise StorageError(
            f"expected adapters of one base model, found {names}; combine adapters of one, or pass "
            "check_backbone=False (--any-base) if these are names of the same"
        )
    prints = {str(s.folder): s.backbone for s in stored}
    if len(set(prints.values())) == 1:
        return stored[0].backbone
    if check:
        shown = {folder: found[:12] if found else None for folder, found in prints.items()}
        raise StorageError(
            f"expected adapters of one quantized base, found fingerprints {shown}: an adapter that LoftQ started is "
            "noise on another base, and adapters with other targets, or without a fingerprint, can't be told to "
            "share it; combine them on the model, or pass check_backbone=False (--any-base) if they do share it"
        )
    return None


def _copies(stored: Sequence[Stored]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of modules that one of ``stored`` trained whole, and whose these modules are."""
    rest: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    for one in stored:
        if one.config.bias != "none":
            raise StorageError(
                f"{one.folder}: expected bias='none', found {one.config.bias!r}; trained biases can't be weighted, so "
                "merge this adapter, or train it with bias='none'"
            )
        for key, tensor in one.rest.items():
            module = holder_of(key.removeprefix(PREFIX).rpartition(".")[0], one.config)
            if module is None:
                raise StorageError(
                    f"{one.folder}: expected low-rank factors and modules_to_save alone, found {key}; save the adapter "
                    "again, without the base model's embeddings (save_embedding_layers=False)"
                )
            if owners.setdefault(module, str(one.folder)) != str(one.folder):
                raise StorageError(
                    f"{module}: expected at most one of the adapters to hold its own trained copy (modules_to_save), "
                    f"found {[owners[module], str(one.folder)]}; leave all but one of these adapters out"
                )
            rest[key] = tensor
    return rest, owners
