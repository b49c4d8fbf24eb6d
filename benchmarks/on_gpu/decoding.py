"""Tokens a second with a cache, one row at a time, adapters on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .clock import Run, interleaved
from .models import Variant, variants, why_not
from .sizes import Sizes

PROMPT = 16
FORMS = ("base", "peft", "ours, fused")  # without gradients both forms are one


@torch.no_grad()
def decode(model: Any, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy: the prompt at once, then a token at a time."""
    cache = None
    for _ in range(new_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True)
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
    return ids


def measured(sizes: Sizes, storage: str) -> Iterator[dict[str, Any]]:
    if (reason := why_not(storage)) is not None:
        yield {"skipped": reason}
        return
    found: list[Variant] = [v for v in variants(sizes, storage) if v.name in FORMS]
    ids = torch.arange(1, PROMPT + 1, device=sizes.device)[None]
    runs: dict[str, Run] = {v.name: v.under(lambda m: decode(m.eval(), ids, sizes.new_tokens)) for v in found}
    times = interleaved(runs, max(sizes.repeats // 2, 1), sizes.device)
    for name, taken in times.items():
        row = {
            "storage": storage,
            "variant": name,
            "ms / token": 1e3 * taken / sizes.new_tokens,
            f"tokens / s, {sizes.layers} layers": sizes.new_tokens / taken,
            "time / base": taken / times["base"],
        }
        if "peft" in times:
            row["time / peft"] = taken / times["peft"]
            if name.startswith("ours"):
                row |= {"aim": "not slower than peft", "met": taken <= times["peft"]}
        yield row
