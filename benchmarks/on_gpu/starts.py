"""LoftQ's alternation here against the published loop, quantizing and a full SVD each step, both on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loftq import factorize

from .clock import interleaved, seconds
from .models import why_not
from .sizes import Sizes

STEPS, AIM = 5, 40


def measured(sizes: Sizes, storage: str) -> Iterator[dict[str, Any]]:
    if (reason := why_not(storage)) is not None:
        yield {"skipped": reason}
        return
    from loftq_speed import reference, weight  # which needs bitsandbytes

    rank = min(64, sizes.hidden // 4)
    for out, fan_in, svd_steps in sizes.weights:
        full = weight(out, fan_in, sizes.device)
        ours = interleaved({"ours": lambda w=full: factorize(w, rank, steps=STEPS)}, 3, sizes.device, 1)["ours"]
        result = factorize(full, rank, steps=STEPS)
        errors: list[float] = []
        taken = seconds(lambda w=full, e=errors, n=svd_steps: e.extend(reference(w, rank, n)), sizes.device)
        theirs = taken / svd_steps * STEPS
        yield {
            "weight": f"{out} x {fan_in}",
            "rank": rank,
            "full-SVD loop s": theirs,
            "of it timed": f"{svd_steps} of {STEPS} steps",
            "ours s": ours,
            "faster": theirs / ours,
            "rounded error": errors[0],
            "loop's error": min(errors),
            "our error": result.error,
            "aim": f"{AIM} times",
            "met": theirs / ours >= AIM,
        }
