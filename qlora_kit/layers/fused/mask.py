"""Dropout that is drawn again for the backward pass instead of being kept: a seed of 8 bytes for a mask of any size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
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
        """1 where an element of ``like`` is kept and 0 elsewhere, in its shape, dtype and device; the same at every
        call on the same kind of device."""
        if self.dropped == _LEVELS or not like.numel():
            return torch.zeros_like(like)
        draws = _draws(self.seed, -(-like.numel() // 4), like.device).view(torch.int16)[: like.numel()]
        return torch.ge(draws, self.dropped - _LEVELS // 2, out=torch.empty_like(draws, dtype=like.dtype)).view(
            like.shape
        )


def _draws(seed: int, count: int, device: torch.device) -> Tensor:
    """int64 (count,) of 64 random bits each, enough for four elements."""
    if device.type == "cpu":  # where torch's own generator takes twice as long
        return torch.from_numpy(np.random.SFC64(seed).random_raw(count).view(np.int64))
    if device.type == "meta":
        return torch.empty(count, dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
