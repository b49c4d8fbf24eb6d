"""Low-rank branches on 1-, 2- and 3-d convolutions, grouped ones included.

A is a convolution to r channels with the base's kernel, stride, padding and dilation; B is a pointwise one
to the output channels. For ``groups`` = g the weight is (out, in / g, *kernel), each output channel seeing
its own group of inputs only. Here every group of inputs goes through the *same* A, giving g * r channels,
and B reads the r of its own group, so that the branch is exactly a grouped convolution with the flattened
weight s * B @ A: it merges into the base, and any start computed on the flattened weight fits it. The rank
need not be a multiple of g. With g = 1 the parameters are PEFT's; with g > 1 PEFT lets every output see all
inputs, which has no grouped weight to merge into, so its grouped adapters are not interchangeable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import Codec
from .base import AdapterLayer
from .named import NamedModules
from .registry import register_layer

_conv: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}


@register_layer(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvAdapter(AdapterLayer):
    """``lora_A[name].weight`` is (r, in / groups, *kernel), ``lora_B[name].weight`` is (out, r, 1, ...)."""

    family = "conv"

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        super().__init__(base_layer, codec)
        self.kind: Any = next(kind for kind in _conv if isinstance(base_layer, kind))
        self.lora_A = NamedModules()
        self.lora_B = NamedModules()

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        base, rank = self.base_layer, A.shape[0]
        inputs, kernel = base.in_channels // base.groups, base.kernel_size
        pointwise = (1,) * len(kernel)
        # nn.Conv modules hold the parameters under the names of the file format; branch() applies them.
        self.lora_A[name] = self.kind(inputs, rank, kernel, bias=False, device="meta")
        self.lora_B[name] = self.kind(rank, base.out_channels, pointwise, bias=False, device="meta")
        self.lora_A[name].weight = nn.Parameter(A.view(rank, inputs, *kernel))
        self.lora_B[name].weight = nn.Parameter(B.view(*B.shape, *pointwise))

    @property
    def in_features(self) -> int:
        return int(self.base_layer.in_channels)

    @property
    def out_features(self) -> int:
        return int(self.base_layer.out_channels)

    def branch(self, x: Tensor, name: str) -> Tensor:
        base, conv = self.base_layer, _conv[self.kind]
        A, B = self.adapter_tensors(name).values()
        x = self.cast_input(self.lora_dropout[name](x), A.dtype)
        groups = base.groups
        shared = A if groups == 1 else A.repeat(groups, *(1,) * (A.ndim - 1))
        if base.padding_mode == "zeros":
            padding = base.padding
        else:
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
            padding = 0
        hidden = conv(x, shared, None, base.stride, padding, base.dilation, groups)
        return conv(hidden * self.scaling[name], B, groups=groups)
