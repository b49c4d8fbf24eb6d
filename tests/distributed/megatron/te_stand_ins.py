"""Modules with the names, attributes and return values of TransformerEngine's linears and megatron-core's over them.

TransformerEngine needs a GPU to be built. These are of one process; what they say of others is theirs to say.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CORE, ENGINE = "megatron.core.extensions.transformer_engine", "transformer_engine.pytorch.module"


class Linear(nn.Module):
    """``transformer_engine.pytorch.Linear``."""

    def __init__(self, columns: int, rows: int, parallel_mode: str | None, *, bias: bool, return_bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, columns))
        self.bias = nn.Parameter(torch.randn(rows)) if bias else None
        self.parallel_mode, self.return_bias = parallel_mode, return_bias
        self.tp_size, self.tp_group, self.sequence_parallel = 1, None, False

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.return_bias else self.bias)

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        return (self.product(x), self.bias) if self.return_bias else self.product(x)


class LayerNormLinear(Linear):
    """``transformer_engine.pytorch.LayerNormLinear``."""

    def __init__(self, columns: int, rows: int, **options: Any) -> None:
        super().__init__(columns, rows, "column", **options)
        self.layer_norm_weight = nn.Parameter(torch.rand(columns) + 0.5)
        self.return_layernorm_output = False
        self.return_layernorm_output_gathered = False

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        normed = F.rms_norm(x, x.shape[-1:], self.layer_norm_weight)
        given = [self.product(normed)]
        given += [self.bias] if self.return_bias else []
        given += [normed] if self.return_layernorm_output else []
        return tuple(given) if len(given) > 1 else given[0]


class TELinear(Linear):
    """megatron-core's: always a pair."""

    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out if self.return_bias else (out, None)


class TEColumnParallelLinear(TELinear):
    pass


class TERowParallelLinear(TELinear):
    pass


class TELayerNormColumnParallelLinear(LayerNormLinear):
    def forward(self, x: Tensor) -> Any:
        out = super().forward(x)
        return out if self.return_bias else (out, None)


for kind in (TELinear, TEColumnParallelLinear, TERowParallelLinear, TELayerNormColumnParallelLinear):
    kind.__module__ = CORE
Linear.__module__, LayerNormLinear.__module__ = f"{ENGINE}.linear", f"{ENGINE}.layernorm_linear"
