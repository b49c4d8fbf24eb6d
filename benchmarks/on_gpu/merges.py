"""Adapters merged into the weights of all layers and taken out again, beside peft's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .clock import peak_bytes, seconds
from .models import ours, peer, why_not
from .sizes import Sizes

STORAGES = ("nf4", "2 bits", None)
WAYS = {"ours": ours, "peft": peer}


def measured(sizes: Sizes, _: str) -> Iterator[dict[str, Any]]:
    for storage in STORAGES:
        if storage is not None and (reason := why_not(storage)) is not None:
            yield {"storage": storage, "skipped": reason}
            continue
        for name, make in WAYS.items():
            if name == "peft" and storage == "2 bits":
                continue  # it would add to packed codes
            if (model := make(sizes, storage)) is not None:
                yield {"storage": storage or str(sizes.dtype)[6:], "variant": name, **_merged(sizes, model)}


def _merged(sizes: Sizes, model: Any) -> dict[str, Any]:
    before = _bytes_of(model)
    model.merge_adapter()  # the first time kernels are loaded
    model.unmerge_adapter()
    again = _bytes_of(model)
    merging = seconds(model.merge_adapter, sizes.device)
    unmerging = seconds(model.unmerge_adapter, sizes.device)
    peak = peak_bytes(model.merge_adapter, sizes.device)
    same = all(torch.equal(one, two) for one, two in zip(before, again, strict=True))
    times = {"merge ms": 1e3 * merging, "unmerge ms": 1e3 * unmerging}
    return {**times, "merge MiB": peak / 2**20, "unmerged bit for bit": same}


def _bytes_of(model: Any) -> list[Tensor]:
    """Of every frozen weight."""
    weights = [p for name, p in model.named_parameters() if "lora_" not in name]
    return [p.detach().clone().contiguous().view(torch.uint8) for p in weights]
