"""Stored adapters combined and compressed from folder to folder, without the model that they belong to.

The factors in a file are all that a combination needs, and it is computed as on a model, layer by layer with the same
functions, so both give the same bits. What the model would know and a file doesn't is checked by what the files say:
that the adapters fit one another in shape, name one base model, and carry one fingerprint if any carries one (see
``adapter_files.backbone``; it covers the adapted modules, so adapters of other targets can't be told to share a base).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adapter_files.backbone import METADATA_KEY
from ..adapter_files.combined_config import check_apart, combined_config, holder_of, rank_fields
from ..adapter_files.folder import PREFIX, write_adapter
from ..checkpoints.files import check_new_folder
from ..config.checks import check_int
from ..errors import AdapterError, ConfigError, StorageError
from ..lowrank.algebra import Combined, CombineReport, Recipe, Weights, combine_layers
from .stored_adapter import StoredAdapter, check_once, parameter_name, read_stored_adapter


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
    own_ranks: bool = False,
    check_backbone: bool = True,
    allow_pickle: bool = False,
) -> CombineReport:
    """Combine stored adapters into a new one in ``out``: ``LoraModel.add_weighted_adapter`` on files.

    Its factors are float32 (float64 where a source's are) whatever the sources', its other tensors are copies of the
    one source's that has them. Arguments not named here are as there.

    Args:
        folders: of the adapters. weights: one for each; or those by module. out: a new or empty folder.
        check_backbone: refuse adapters that name two base models, or of whose quantized bases it isn't sure that
            they are one. Where it is False, and it isn't sure, the result carries no fingerprint.

    Raises:
        StorageError: a folder holds no adapter, or the adapters aren't of one base model.
        AdapterError, ConfigError: as for ``add_weighted_adapter``. Nothing is written on any error.
    """
    recipe = Recipe(combination_type, svd_rank, density, majority_sign_method, svd_clamp, energy, seed)
    if isinstance(folders, (str, Path)) or not folders:
        raise AdapterError(f"folders: expected a list with at least one adapter's folder, found {folders!r}")
    check_new_folder(Path(out))
    check_once(folders)
    stored = [read_stored_adapter(folder, allow_pickle=allow_pickle) for folder in folders]
    names = [str(folder) for folder in folders]
    paths = sorted({path for one in stored for path in one.branches})
    layers = {path: {i: s.branches[path] for i, s in enumerate(stored) if path in s.branches} for path in paths}
    check_apart({name: one.config for name, one in zip(names, stored, strict=True)}, paths)
    for path in paths:
        _check_same_module(path, [one for one in stored if path in one.shapes])
    backbone = _common_backbone(stored, check_backbone)
    rest, copied = _copies(stored)
    rest |= _tables(stored, copied, paths)
    results, report = combine_layers(layers, names, weights, recipe, own_ranks=own_ranks)
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
    own_ranks: bool = False,
    allow_pickle: bool = False,
) -> CombineReport:
    """Write the adapter in ``folder`` with lower ranks into ``out``: in each module the best approximation there is.

    All that isn't a factor (biases, whole modules, the fingerprint of the base) stays as it is.

    Args:
        out: a new or empty folder.
        rank: of every module, where it isn't lower already. energy: in its place, a share in (0, 1]: each module gets
            the smallest rank that keeps it.
        own_ranks: let each module keep the rank that it got. PEFT and this toolkit read that; servers know one rank and
            one scale for all modules, so by default factors are filled up with zeros to the largest.

    Returns:
        Each module's rank and the error that it costs; a table when printed.

    Raises:
        ConfigError: neither or both of ``rank`` and ``energy`` are given, or out of range.
        StorageError, AdapterError: there is no adapter, or it holds NaN. Nothing is written on any error.
    """
    if (rank is None) == (energy is None):
        fix = "pass rank=8, say" if rank is None else "leave one of them out"
        raise ConfigError(f"rank, energy: expected one of the two, found {rank!r} and {energy!r}; {fix}")
    if rank is not None:
        check_int("rank", rank, 1, "pass a rank such as 8")
    recipe = Recipe("svd", rank=rank, energy=energy)
    check_new_folder(Path(out))
    stored = read_stored_adapter(folder, allow_pickle=allow_pickle)
    layers = {path: {0: branch} for path, branch in stored.branches.items()}
    results, report = combine_layers(layers, [str(folder)], [1.0], recipe, own_ranks=own_ranks)
    config = dataclasses.replace(stored.config, **rank_fields({path: r.rank for path, r in results.items()}))
    state = {key: t for path, found in results.items() for key, t in _as_stored(path, found, stored).items()}
    metadata = {METADATA_KEY: stored.backbone} if stored.backbone else None
    write_adapter(Path(out), config.as_stored(), {**state, **stored.rest}, metadata)
    return report


def _as_stored(path: str, found: Combined, source: StoredAdapter) -> dict[str, Tensor]:
    """The factors under the keys and in the shapes of the file of ``source``, which has this module."""
    (key_A, key_B), (shape_A, shape_B) = source.keys[path], source.shapes[path]
    return {
        key_A: found.A.reshape(found.rank, *shape_A[1:]).contiguous(),
        key_B: found.B.reshape(shape_B[0], found.rank, *shape_B[2:]).contiguous(),
    }


def _check_same_module(path: str, stored: Sequence[StoredAdapter]) -> None:
    """Refuse adapters whose factors at ``path`` can't be of one module."""
    kinds = {str(s.folder): (s.keys[path][0].rpartition(path)[2], *s.shapes[path][0][1:]) for s in stored}
    outs = {str(s.folder): s.shapes[path][1][0] for s in stored}
    for found in (kinds, outs):
        if len(set(found.values())) > 1:
            raise StorageError(
                f"{path}: expected adapters of one module, with factors of one kind and size, found {found}; combine "
                "adapters of the same base model"
            )


def _place(name: str) -> str:
    """A name of a base model, or where its folder is, which has several: the one that a script was given, and all of
    its path."""
    return os.path.realpath(name) if os.path.isdir(name) else name


def _common_backbone(stored: Sequence[StoredAdapter], check: bool) -> str | None:
    """The fingerprint of the base that all of ``stored`` belong to, if they carry one."""
    names = {str(s.folder): s.config.base_model_name_or_path for s in stored if s.config.base_model_name_or_path}
    if check and len(set(map(_place, names.values()))) > 1:
        raise StorageError(
            f"expected adapters of one base model, found {names}; combine adapters of one, or pass "
            "check_backbone=False if these are names of the same"
        )
    prints = {str(s.folder): s.backbone for s in stored}
    if len(set(prints.values())) == 1:
        return stored[0].backbone
    if check:
        shown = {folder: found[:12] if found else None for folder, found in prints.items()}
        raise StorageError(
            f"expected adapters of one quantized base, found fingerprints {shown}: an adapter that LoftQ started is "
            "noise on another base, and adapters with other targets, or without a fingerprint, can't be told to "
            "share it; combine them on the model, or pass check_backbone=False if they do share it"
        )
    return None


def _copies(stored: Sequence[StoredAdapter]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
                continue  # of the base, see ``_tables``
            if owners.setdefault(module, str(one.folder)) != str(one.folder):
                raise StorageError(
                    f"{module}: expected at most one of the adapters to hold its own trained copy (modules_to_save), "
                    f"found {[owners[module], str(one.folder)]}; leave all but one of these adapters out"
                )
            rest[key] = tensor
    return rest, owners


def _tables(stored: Sequence[StoredAdapter], copied: Mapping[str, str], paths: Sequence[str]) -> dict[str, Tensor]:
    """The base's own tables of words, which adapters bring along that were trained with more of them; not those of
    which one of ``stored`` has a trained copy."""
    found: dict[str, tuple[Tensor, Path]] = {}
    for one in stored:
        for key, tensor in one.rest.items():
            name = parameter_name(key)
            module, _, local = name.rpartition(".")
            if holder_of(module, one.config) is not None or module in copied:
                continue
            if tensor.dim() > 2 or local not in ("weight", "bias"):
                raise StorageError(
                    f"{one.folder}: expected low-rank factors, modules_to_save and tables of words, found {key}; save "
                    "the adapter again"
                )
            if name in found and not torch.equal(found[name][0], tensor):
                raise StorageError(
                    f"{name}: expected the base's own table in every adapter that holds it, found different ones in "
                    f"{found[name][1]} and {one.folder}; combine adapters of one base, or save them without the tables "
                    "(save_embedding_layers=False)"
                )
            found.setdefault(name, (tensor, one.folder))
    rest = {}
    for name, (tensor, _) in found.items():
        module, _, local = name.rpartition(".")
        rest[f"{PREFIX}{module}.{'base_layer.' if module in paths else ''}{local}"] = tensor
    return rest
