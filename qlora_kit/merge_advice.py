"""What to say when a merge would lose the delta: how much, why, and which setting keeps it, tried on the layers that
have most of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .fidelity import LayerFidelity, MergeReport, add_delta_, compare, retained_of
from .merge_task import MergeTask
from .requantize import Grid, rounded

if TYPE_CHECKING:
    from .model import LoraModel

# Layers that settings are tried on, and the settings: rounding and residual rank, cheapest first.
_TRIED = 3
_SETTINGS = (("scale-search", 0), ("nearest", 8), ("nearest", 16), ("nearest", 32))


def refusal(model: LoraModel, task: MergeTask, report: MergeReport) -> str:
    """The message. ``model`` is as before the merge of which ``report`` tells."""
    deltas = sum(layer.delta_norm**2 for layer in report.layers) ** 0.5
    lost = sum((layer.delta_error * layer.delta_norm) ** 2 for layer in report.layers) ** 0.5
    into = "the storage that the layers have" if task.into == "same" else task.into
    where = max(report.layers, key=lambda layer: layer.delta_norm)
    lines = (
        f"expected at least {task.least_retained:.0%} of the delta to survive rounding into {into}, found "
        f"{report.retained:.1%}: rounding moves the weights {lost / deltas:.1f} times as far as the adapter does "
        f"(largest delta: {where.path}, {where.delta_ratio:.2%} of its weight). The model is as it was. "
    )
    tried = _tried(model, task, report)
    if tried:
        found = ", ".join(f"{name} keeps {share:.1%}" for name, share in tried)
        lines += f"On the {min(_TRIED, len(report.layers))} layers with the largest deltas {found}. "
    return lines + "into='bfloat16' keeps all of it in 16 bits; force=True merges all the same"


@torch.no_grad()
def _tried(model: LoraModel, task: MergeTask, report: MergeReport) -> list[tuple[str, float]]:
    """Settings in the order of their cost, up to the first that keeps enough, and what each retains."""
    layers = model.adapter_layers()
    largest = sorted((layer for layer in report.layers if layer.path in layers), key=lambda layer: -layer.delta_norm)
    found = []
    for way, rank in _SETTINGS:
        if (way, rank) == (task.rounding, task.residual_rank) or rank < task.residual_rank:
            continue
        accounts: list[LayerFidelity] = []
        for row in largest[:_TRIED]:
            layer = layers[row.path]
            codec, base = layer.codec, layer.base_layer
            target = task.target(codec.quantizer(base), linear=layer.family == "linear")
            parts = {name: weight for name, weight in task.parts.items() if name in layer.r}
            if target is None or not parts:
                continue
            delta = layer.stacked(parts)
            with layer.unmerged():
                ideal, quantized = codec.read(base), codec.quantized(base)
                grid = Grid(quantized, *delta) if quantized is not None and target == codec.quantizer(base) else None
                norms = add_delta_(ideal, *delta, row.path)
                tried = rounded(ideal, target, way, None, rank, grid)
            stored = tried.quantized.dequantize()
            accounts.append(
                compare(row.path, codec.name, ideal, delta, norms, [(slice(0, len(stored)), stored)], tried.residual)
            )
        if accounts:
            share = retained_of(accounts)
            found.append((f"residual_rank={rank}" if rank else f"rounding={way!r}", share))
            if share >= max(task.least_retained, 0.9):
                break
    return found
