"""Steps of AdamW on factors of any floating dtype, which can all be taken back."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from qlora_kit.errors import ConfigError

# Gradients are taken of so many times the loss, halved where they overflow: float16 holds few digits below 6e-5. Adam's
# steps don't depend on it.
_SCALE = 64.0
_LEAST = 2.0**-20


class Steps:
    """Of AdamW without weight decay, whose rate rises for a tenth of ``number`` steps and falls to 0 as a cosine does.

    Steps are taken on float32 copies: a factor in bfloat16 is nowhere moved by less than 0.4 % of itself.

    Attributes:
        scale: what losses are to be multiplied with.
    """

    def __init__(self, factors: Sequence[nn.Parameter], learning_rate: float, number: int) -> None:
        self.scale = _SCALE
        self._factors, self._before = factors, [factor.detach().clone() for factor in factors]
        self._copies = [nn.Parameter(factor.detach().float().clone()) for factor in factors]
        self._optimizer = torch.optim.AdamW(self._copies, lr=learning_rate, weight_decay=0.0)
        rise = max(1, number // 10)

        def share(step: int) -> float:
            return min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / number)) / 2

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, share)

    @torch.no_grad()
    def take(self) -> None:
        """Take one by the gradients that the factors have, and drop these; none where they overflowed.

        Raises:
            ConfigError: they do however small the loss is.
        """
        finite = all(factor.grad is None or bool(factor.grad.isfinite().all()) for factor in self._factors)
        for copy, factor in zip(self._copies, self._factors, strict=True):
            copy.grad = factor.grad.float() if finite and factor.grad is not None else None
            factor.grad = None
        self._optimizer.step()
        self._schedule.step()
        for copy, factor in zip(self._copies, self._factors, strict=True):
            factor.copy_(copy)
        if not finite:
            self.scale /= 2
            if self.scale < _LEAST:
                raise ConfigError(
                    "distill: expected finite gradients, found NaN or infinity in step after step; load the model in "
                    "bfloat16 or float32, or pass a smaller learning_rate"
                )

    @torch.no_grad()
    def undo(self) -> None:
        """Put back what the factors were before the first step."""
        for factor, before in zip(self._factors, self._before, strict=True):
            factor.copy_(before)
            factor.grad = None
