"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as (in, out)."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .dense import TransposedCodec
from .plain_weight import Trial, filled, holding_values
from .registry import register_codec


@register_codec(Conv1D)
class Conv1DCodec(TransposedCodec):
    """``Conv1D``: y = x W + b with W (in, out)."""

    name = "conv1d"

    def _trial(self, module: nn.Module) -> Trial:
        with torch.device("meta"):
            sample = Conv1D(4, 5)
        return Trial(holding_values(sample), [filled(2, 3, 5), filled(3, 5)])

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.nf, module.nx  # type: ignore[return-value]
