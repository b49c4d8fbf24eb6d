"""transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored as (in, out)."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from .base import register_codec
from .dense import TransposedCodec


@register_codec(Conv1D)
class Conv1DCodec(TransposedCodec):
    """``Conv1D``: y = x W + b with W (in, out)."""

    name = "conv1d"

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.nf, module.nx  # type: ignore[return-value]
