"""Low-rank branches on y = W x + b, however W is stored: dense, transposed, 4-bit, 8-bit."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.base import autocast_dtype
from .base import AdapterLayer
from .branch import Branch
from .choice import why_plain
from .fused import Base, fused_linear
from .mask import Mask
from .named import NamedModules
from .registry import register_layer


def factor_module(weight: Tensor) -> nn.Linear:
    """A bias-free linear holding ``weight`` (out, in) without spending time on a start of its own."""
    module = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(module)
    module.out_features, module.in_features = weight.shape
    module.weight = nn.Parameter(weight)
    module.register_parameter("bias", None)
    return module


class TiedFactor(nn.Module):
    """A factor that is another layer's, transposed: B of an embedding is A of the head that shares its table."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.transposed = parameter

    @property
    def weight(self) -> Tensor:
        return self.transposed.T

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@register_layer(nn.Linear)
class LinearAdapter(AdapterLayer):
    """``lora_A[name].weight`` is (r, in), ``lora_B[name].weight`` is (out, r)."""

    family = "linear"
    #: What factors are unless someone has put others there.
    factor_types = (nn.Linear, TiedFactor)

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        super().__init__(base_layer, codec)
        self.lora_A = NamedModules()
        self.lora_B = NamedModules()

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_A[name] = factor_module(A)
        self.lora_B[name] = factor_module(B)

    def tie_factors_(self, name: str, source: AdapterLayer) -> None:
        A, B = source.adapter_tensors(name).values()
        self.lora_A[name], self.lora_B[name] = TiedFactor(B), TiedFactor(A)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self._in_effect
        if not names or args or kwargs or why_plain(self, x, names) is not None:
            return super().forward(x, *args, **kwargs)
        base = Base(self.base_layer, self.codec, autocast_dtype(x))
        return fused_linear(base, x, self.base_layer.bias, [self._branch(name) for name in names])

    def _branch(self, name: str) -> Branch:
        dropout = self.lora_dropout[name]
        mask = Mask.draw(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else None
        A, B = self.adapter_tensors(name).values()
        return Branch(A, B, self.scaling[name], mask)

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_A[name], self.lora_B[name]
        x = self.cast_input(self.lora_dropout[name](x), A.weight.dtype)  # type: ignore[arg-type]
        return B(A(x) * self.scaling[name])
