"""How large everything is: two decoder layers of a 7B Llama, or next to nothing on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sizes:
    """
    Attributes:
        tokens: of the one row that steps are measured on.
        new_tokens: decoded after a prompt of 16.
        repeats: of which medians are taken.
        weights: (out, in) that LoftQ starts from, and the steps of the full-SVD loop that are timed.
    """

    device: str
    hidden: int
    intermediate: int
    heads: int
    layers: int
    tokens: int
    new_tokens: int
    rank: int
    repeats: int
    weights: tuple[tuple[int, int, int], ...]
    vocabulary: int = 512
    dtype: torch.dtype = torch.bfloat16


FULL = Sizes("cuda", 4096, 11008, 32, 2, 2048, 48, 16, 15, ((4096, 4096, 5), (11008, 4096, 1)))
DRY = Sizes("cpu", 64, 96, 4, 2, 24, 3, 4, 2, ((96, 64, 5), (160, 64, 1)))
