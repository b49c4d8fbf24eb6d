"""What to say when a merge would lose the delta: how much, why, and which setting keeps it, tried on the layers that
have most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, MergeError
from ..injection.adapted import Adapted
from .base_choice import base_weight, grid_of
from .fidelity import LayerFidelity, add_delta_, compare, norms_of, share_of
from .report import MergeReport
from .requantize import WAYS, rounded
from .task import MergeTask

# Layers that settings are tried on; the residual ranks among these; and the share with which the search is over.
_TRIED, _RANKS, _ENOUGH = 3, (8, 16, 32), 0.9


def refusal(adapted: Adapted, task: MergeTask, report: MergeReport, kept: float, moments: Mapping[str, Tensor]) -> str:
    """The message.

    Args:
        adapted: as before the merge of which ``report`` tells.
        kept: the share of the deltas that is left where weights were rounded.
        moments: second moments of the layers' inputs by path, as far as they are known.
    """
    deltas = sum(layer.delta_norm**2 for layer in report.layers) ** 0.5
    lost = sum((layer.delta_error * layer.delta_norm) ** 2 for layer in report.layers) ** 0.5
    into = "the storage that the layers have" if task.into == "same" else task.into
    where = max(report.layers, key=lambda layer: layer.delta_norm)
    lines = (
        f"expected at least {task.least_retained:.0%} of the delta to survive rounding into {into}, found "
        f"{kept:.1%}: rounding moves the weights {lost / deltas:.1f} times as far as the adapter does "
        f"(largest delta: {where.path}, {where.delta_ratio:.2%} of its weight). The model is as it was. "
    )
    layers = adapted.layers()
    tried = sorted((layer for layer in report.layers if layer.path in layers), key=lambda layer: -layer.delta_norm)
    paths = [layer.path for layer in tried[:_TRIED]]
    found = []
    for setting, way, rank in _settings(task, _whole(moments, paths)):
        share = _retained(adapted, task, report, moments, paths, way, rank)
        found.append(f"{setting} keeps {share:.1%}")
        if share >= max(task.least_retained, _ENOUGH):
            break
    if found:
        lines += f"On the {len(paths)} layers with the largest deltas {', '.join(found)}. "
    if task.rounding != "error-feedback" and not _whole(moments, paths):
        lines += "With statistics=TEXT rounding='error-feedback' may keep more (not tried: it looks at the inputs). "
    if report.base == "dequantized":
        lines += "Onto the 16-bit weights (base='original', original=DIR) rounding keeps small deltas too. "
    return lines + "into='bfloat16' keeps all of it in 16 bits; force=True merges all the same"


def _whole(moments: Mapping[str, Tensor], paths: list[str]) -> bool:
    """Whether error feedback has what it needs on ``paths``: matrices, not diagonals."""
    return all(path in moments and moments[path].dim() == 2 for path in paths)


def _settings(task: MergeTask, whole: bool) -> Iterator[tuple[str, str, int]]:
    """Changes to what was asked for, cheapest first, and the rounding and residual rank with them."""
    for way in WAYS[WAYS.index(task.rounding) + 1 :]:
        if way != "error-feedback" or whole:
            yield f"rounding={way!r}", way, task.residual_rank
    for rank in _RANKS:
        if rank > task.residual_rank:
            yield f"residual_rank={rank}", task.rounding, rank


@torch.no_grad()
def _retained(
    adapted: Adapted,
    task: MergeTask,
    report: MergeReport,
    moments: Mapping[str, Tensor],
    paths: list[str],
    way: str,
    rank: int,
) -> float:
    """The share of the deltas at ``paths`` that is kept by this rounding and residual rank."""
    original = task.original if report.base == "original" else None
    accounts: list[LayerFidelity] = []
    for path in paths:
        layer = adapted.layers()[path]
        base: Any = layer.base_layer
        codec, own = layer.codec, layer.codec.quantizer(base)
        target = task.target(own, linear=layer.family == "linear")
        if target is None:
            continue
        delta = layer.stacked(task.parts)
        with layer.unmerged():
            ideal, _ = base_weight(path, codec, base, original)
            grid = grid_of(codec, base, target, delta, original)
            norms = norms_of(ideal, *delta)
            add_delta_(ideal, *delta, path)
            try:
                found = rounded(ideal, target, way, moments.get(path), rank, grid)
            except ConfigError as error:
                raise MergeError(f"{path}: {error} (no layer was changed)") from error
        residual = found.residual
        if residual is not None:  # in the dtype that it is kept in
            A, B = (factor.to(task.residual_dtype or torch.float32).float() for factor in residual)
            residual = A, B
        weight = found.quantized.dequantize()
        pieces = [(slice(0, len(weight)), weight)]
        accounts.append(compare(path, codec.name, ideal, delta, norms, pieces, residual, moments=moments.get(path)))
    return share_of(accounts)
