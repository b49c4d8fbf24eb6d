"""Dropout that is drawn again for the backward pass instead of being kept: a seed of 8 bytes for a mask of any size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LEVELS = 1 << 16


@dataclass(frozen=True)
class Mask:
    """Which elements of a tensor are kept.

    Attributes:
        seed: of the draw.
        dropped: elements are dropped with probability ``dropped / 65536``, the nearest to what was asked for.
    """

    seed: int
    dropped: int

    @classmethod
    def draw(cls, p: float) -> Mask | None:
        """A mask that drops with probability ``p``, its seed from torch's generator, which checkpointing sets back for
        what it computes again; None where nothing is dropped."""
        if (dropped := round(p * _LEVELS)) == 0:
            return None
        return cls(int(torch.randint(2**63 - 1, ())), dropped)

    @property
    def scale(self) -> float:
        """What kept elements are multiplied by, so that the mean stays."""
        return 0.0 if self.dropped == _LEVELS else _LEVELS / (_LEVELS - self.dropped)

    def kept(self, like: Tensor) -> Tensor:
        """Boolean, in the shape and on the device of ``like``; the same at every call on the same kind of device."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        count = like.numel()
        draws = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device)
        draws.random_(-(2**63), None, generator=generator)  # 64 random bits each: four elements' worth
        return (draws.view(torch.int16)[:count] >= self.dropped - _LEVELS // 2).view(like.shape)
