"""The best low-rank adapter of the difference of two checkpoints, streamed from their shards.

By Eckart and Young the branch of rank r that is closest to a difference D = tuned - base, in the Frobenius norm, keeps
D's r largest singular triplets; what it holds is their share of all squared singular values. Each module is decomposed
by itself: its two tensors are read, subtracted and let go, and only the thin factors stay.

What a fine-tune changed besides the targeted weights, an adapter of factors can't hold. It is measured all the same and
named in the report, and with ``whole`` stored: a module as it is in the tuned checkpoint (PEFT's ``modules_to_save``).
For ``whole="changed"`` that goes for every module that changed, but a linear layer whose bias alone changed besides
its weight keeps its branch, and the biases are stored as trained ones (PEFT's ``bias="lora_only"`` or ``"all"``).

The fast solver for wide matrices is an approximation, and its depth is set where it is none in effect: also on white
noise, the flattest spectrum there is, it holds what the best branch would to within a thousandth.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...adapter_files.folder import write_adapter
from ...checkpoints.files import check_new_folder
from ...checkpoints.pair import CheckpointPair, norm
from ...config.checks import check_device, check_int, failure
from ...errors import ConfigError, StorageError
from ...lowrank import factor_pair, pick_solver, truncated_svd
from ...lowrank.algebra import one_rank
from ...lowrank.algebra.exact import exact_rank, rank_for_energy
from ...lowrank.decomposition import LEAST_COLUMNS
from ...merging.task import DTYPES, storage_name
from .contents import Contents
from .report import ExtractedModule, ExtractReport

# Blocks of the Krylov solver; see the module's text.
_DEPTH = 24


@torch.no_grad()
def extract_folders(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    rank: int | None = None,
    *,
    energy: float | None = None,
    target_modules: Sequence[str] | str = "all-linear",
    exclude_modules: Sequence[str] | str | None = None,
    whole: Sequence[str] | str | None = None,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str = "cpu",
    own_ranks: bool = False,
) -> ExtractReport:
    """Write into ``out`` the adapter that comes closest to turning the model ``base`` into ``tuned``.

    It is one of PEFT's like any other, with scaling 1, for the tuned model's class on the base's weights.

    Args:
        base, tuned: folders (or repositories on the Hub) of two checkpoints of one model, with or without its head, in
            any floating types; the base may be quantized, by bitsandbytes or this toolkit.
        rank: of every module, or its smaller dimension where that is less.
        energy: in place of ``rank``, a share in (0, 1]: each module gets the smallest rank that keeps it.
        target_modules, exclude_modules: as in ``LoraConfig``. Modules without a difference get no branch.
        whole: names of modules to store as they are in the tuned checkpoint, or "changed": all that differ outside of
            the branches, and changed biases, so that little but the targets' truncation is lost. What has no module
            (experts stored one by one), or one that is tied to another, stays out, and in the report.
        dtype: of the factors; float32, bfloat16 or float16, or its name.
        device: where the decompositions are computed.
        own_ranks: let each module keep the rank that it got. PEFT and this toolkit read that; servers know one rank and
            one scale for all modules, so by default factors are filled up with zeros to the largest.

    Returns:
        Each module's rank and captured energy, and all that was left out; a table when printed.

    Raises:
        ConfigError: neither or both of ``rank`` and ``energy``, or an argument out of range.
        TargetError: ``target_modules`` or ``whole`` match nothing, or a tied weight.
        StorageError: see ``CheckpointPair``; NaN; nothing differs; a tensor that only one of the two has, or that was
            resized, isn't in ``whole``; ``out`` is a file or a folder in which something is. Nothing is written on any
            error.
    """
    _check_arguments(rank, energy)
    kept = _dtype_of(dtype)
    check_device("device", device)
    check_new_folder(out := Path(out))
    pair = CheckpointPair(base, tuned)
    contents = Contents(pair, target_modules, exclude_modules, whole)
    modules, equal = [], []
    branches: dict[str, tuple[Tensor, Tensor]] = {}
    for entry in tqdm(contents.entries, desc="extract", leave=False, disable=None):
        difference, base_size = contents.difference(entry)
        if not difference.any():
            equal.append(entry.path)
            continue
        A, B = (factor.to("cpu", kept) for factor in best_branch(difference.to(device), rank, energy))
        branches[entry.path] = A, B
        modules.append(_account(entry.path, difference, base_size, A, B))
    if not modules:
        names = [tensor.name for tensor in contents.others()[:5]]
        raise StorageError(
            f"{pair.tuned.folder}: expected a targeted module that differs from that in {pair.base.folder}, found "
            f"nothing to extract: all {len(equal)} are equal; "
            + (f"what differs is {', '.join(names)}, so target that" if names else "pass the tuned checkpoint")
        )
    filled_to = None
    if not own_ranks and len({A.shape[0] for A, _ in branches.values()}) > 1:
        branches = one_rank(branches)
        filled_to = next(iter(branches.values()))[0].shape[0]
    for entry in contents.entries:
        if entry.path in branches:
            contents.add_(entry, *branches[entry.path])
    report = ExtractReport(
        str(base), str(tuned), tuple(modules), tuple(equal), tuple(contents.others()), tuple(pair.only_base), filled_to
    )
    config = contents.config(base)
    write_adapter(out, config.as_stored(), {**contents.factors, **contents.copies()}, contents.metadata())
    return report


def best_branch(difference: Tensor, rank: int | None, energy: float | None = None) -> tuple[Tensor, Tensor]:
    """The factors of the best approximation of a nonzero matrix, with the singular values shared evenly.

    Args:
        difference: (out, in), float32. rank: cut at min(out, in). energy: the share to keep, in place of a rank.

    Returns:
        A (rank, in) and B (out, rank): ``B @ A`` is the approximation.
    """
    size = min(difference.shape)
    if energy is not None:
        values = _singular_values(difference)
        noise = 2 * (size * torch.finfo(torch.float64).eps) ** 0.5 * values[0].item()
        rank = max(1, min(rank_for_energy(values, energy), exact_rank(values, noise, torch.float32)))
    kept = min(rank or size, size)
    solver = pick_solver(difference.shape, kept)
    if solver == "krylov" and (energy is not None or 2 * _DEPTH * max(kept, LEAST_COLUMNS) > size):
        solver = "gram"
    return factor_pair(*truncated_svd(difference, kept, solver=solver, depth=_DEPTH), scaling=1.0)


def _singular_values(matrix: Tensor) -> Tensor:
    """All of them, descending, in float64, from the smaller Gram matrix."""
    small = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T).double()
    return torch.linalg.eigvalsh(small @ small.T).clamp_min(0).sqrt().flip(0)


def _account(path: str, difference: Tensor, base_size: float, A: Tensor, B: Tensor) -> ExtractedModule:
    """The numbers of one module, measured on the factors as they are stored."""
    size = norm(difference)
    lost = norm(difference - B.float() @ A.float()) / size
    relative = size / base_size if base_size else float("inf")
    return ExtractedModule(path, A.shape[0], size, relative, max(0.0, 1 - lost**2), lost)


def _check_arguments(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        fix = "pass rank=32, say" if rank is None else "leave one of them out"
        raise ConfigError(f"rank, energy: expected one of the two, found {rank!r} and {energy!r}; {fix}")
    if rank is not None:
        check_int("rank", rank, 1, "pass a rank such as 32")
    number = isinstance(energy, (int, float)) and not isinstance(energy, bool)
    if energy is not None and not (number and 0 < energy <= 1):
        raise failure("energy", "a share in (0, 1]", energy, "pass one such as energy=0.9")


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = DTYPES.get(storage_name(dtype)) if isinstance(dtype, (str, torch.dtype)) else None
    if found is None:
        raise failure("dtype", f"one of {', '.join(DTYPES)}", dtype, "pass 'float32'")
    return found
