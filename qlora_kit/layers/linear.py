"""Low-rank branches on y = W x + b, however W is stored: dense, transposed, 4-bit, 8-bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.base import autocast_dtype
from .base import AdapterLayer
from .fused.branch import Branch
from .fused.choice import trains, watched, why_plain
from .fused.linear import Base, Made, fused_linear
from .fused.mask import Mask
from .named import NamedModules
from .registry import register_layer
from .row_choice import rows_of


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
        if not names or args or kwargs:
            return super().forward(x, *args, **kwargs)
        if why_plain(self, x, names) is None:
            return self._fused(x, x, names)
        by_parts = trains(self) or rows_of(self) is not None or self.rounding_in_effect(names) is not None
        if by_parts:
            return super().forward(x)
        self.check_held_whole()
        return self._evaluated(x, names)

    def _evaluated(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The plain form in evaluation: s goes into the sum, which spares a step of decoding one call."""
        base: Any = self._modules["base_layer"]  # as an attribute it costs as much as a small product
        result = self.codec.forward(base, x)
        for name in names:
            y = self._low_rank(x, name)
            y = y if y.dtype is result.dtype else y.to(result.dtype)
            result = torch.add(result, y, alpha=self.scaling[name])
        return result

    def of_made(self, made: Made, given: Sequence[Tensor]) -> Tensor:
        """This layer's output for the input that ``made`` makes of ``given``; in training ``given`` is kept for the
        backward pass, and the input isn't."""
        names, first = self._in_effect, given[0]
        if not names or watched(self) or why_plain(self, first, names) is not None:
            return self(made.make(*given))
        return self._fused(given, first, names, made)

    def _fused(self, given: Any, like: Tensor, names: Sequence[str], made: Made | None = None) -> Tensor:
        merged = self.as_merged(names)
        base, codec = (self.base_layer, self.codec) if merged is None else (merged.module, merged.codec)
        dtypes = codec.linear_dtypes(base, like)
        known = Base(base, codec, dtypes[0] if dtypes else autocast_dtype(like), merged is not None)
        bias = getattr(self.base_layer, "bias", None)
        return fused_linear(known, given, bias, [self._branch(name) for name in names], made)

    def _branch(self, name: str) -> Branch:
        dropout = self.lora_dropout[name]
        mask = Mask.draw(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else None
        A, B = self.adapter_tensors(name).values()
        return Branch(A, B, self.scaling[name], mask)

    def branch(self, x: Tensor, name: str) -> Tensor:
        return self._low_rank(x, name, self.scaling[name])

    def _low_rank(self, x: Tensor, name: str, scale: float | None = None) -> Tensor:
        """B (A dropout(x)), times ``scale`` between the two."""
        # Each name looked up through this class's own __getattr__ costs as much as a small product.
        parts: Any = self._modules
        A, B, dropout = (parts[part]._modules[name] for part in _PARTS)
        if type(dropout) is not nn.Identity:
            x = dropout(x)
        if x.dtype is not (dtype := A.weight.dtype):
            x = self.cast_input(x, dtype)
        narrow = _product(A, x)
        return _product(B, narrow if scale is None else narrow * scale)

    def stacked_factors(self, names: Sequence[str]) -> tuple[Tensor, Tensor, Any] | None:
        """A (adapters, in, r), B (adapters, r, out) and the scaling, or several (adapters, 1, 1)."""
        parts: Any = self._modules
        As, Bs, dropouts = ([parts[part]._modules[name] for name in names] for part in _PARTS)
        for dropout in dropouts:
            if type(dropout) is not nn.Identity and dropout.training:
                return None
        if not (all(map(_plain, As)) and all(map(_plain, Bs))):
            return None
        A_weights, B_weights = [_weight(A) for A in As], [_weight(B) for B in Bs]
        first = A_weights[0]
        if any(A.shape != first.shape or A.dtype is not first.dtype for A in A_weights):
            return None
        A, B = torch.stack(A_weights).mT, torch.stack(B_weights).mT
        scalings = [self.scaling[name] for name in names]
        same = scalings.count(scalings[0]) == len(scalings)  # a number needs no way to the device
        return A, B, scalings[0] if same else A.new_tensor(scalings).view(-1, 1, 1)

    def stacked_branches(self, x: Tensor, A: Tensor, B: Tensor, scaling: Any) -> tuple[Tensor, float]:
        narrow = torch.bmm(self.cast_input(x, A.dtype), A)
        if isinstance(scaling, Tensor):
            return torch.bmm(narrow * scaling, B), 1.0
        return torch.bmm(narrow, B), scaling


_PARTS = ("lora_A", "lora_B", "lora_dropout")


def _plain(factor: Any) -> bool:
    """Whether it is nobody's concern if ``factor`` is called, or its weight is multiplied with."""
    return type(factor) is nn.Linear and not watched(factor) and "forward" not in vars(factor)


def _weight(factor: Any) -> Tensor:
    """``factor.weight``, in less time."""
    weight: Tensor | None = factor._parameters.get("weight")
    return factor.weight if weight is None else weight  # a replica's is no parameter of its own


def _product(factor: Any, x: Tensor) -> Tensor:
    """``factor(x)``, called as a function where nobody could see the difference."""
    product: Tensor = F.linear(x, _weight(factor)) if _plain(factor) else factor(x)
    return product
