"""Our own packed linear layer: 2-, 3-, 4- or 8-bit codes without a gap, any table, scales in 32 or 8 bits.

What a module holds, all of it in its state dict:

- ``weight``: uint8, the codes in row-major order, packed by ``packing.pack``;
- ``scales``: one a block, float32, or uint8 codes with ``scales_absmax`` and ``scales_offset`` (double
  quantization); types with a range also have ``shifts`` in the same way;
- ``codebook``: float32 (2^memory,), the levels by code, so that a stored model doesn't depend on tables here.

Rotated types hold the codes of rotated rows, and rotate the inputs before they multiply.

At 2 bits and blocks of 64 that is 2.5 bits a weight, or 2.13 with double quantization. The forward and the
backward each read the weight once, some rows at a time or inside the product where ``kernels`` has a way to, and keep
no dense copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..kernels.reading import Reader
from .base import Codec, autocast_dtype, checked_weight
from .codebooks import codebook, scheme
from .dense import dense_linear, take_bias_
from .lookup import frozen_linear
from .packing import pack, packed_bytes, unpack
from .pieces import row_pieces
from .plain_weight import reason_against_computed
from .quantized import SCALES_BLOCKSIZE, Quantized, Quantizer, Scales, dynamic_table
from .registry import register_codec
from .trellis.rotation import rotate, unrotate


class PackedLinear(nn.Linear):
    """``nn.Linear`` over packed codes; frozen, except for its bias. See the module's text.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        quant_type: a type of ``codebooks.SCHEMES`` of 2, 3, 4 or 8 bits.
        blocksize: weights that share a scale; ``in_features`` for rows, which rotated types have whatever it says.
        double_quant: keep the scales in 8 bits.
        compute_dtype: what the weight would be dequantized in; products are computed in the input's dtype.
        device: "meta" to be filled later; elsewhere the weight starts as zeros.

    Raises:
        CodecError: an unknown type, or one whose bits can't be packed.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        quant_type: str = "signed2",
        blocksize: int = 64,
        double_quant: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.in_features, self.out_features = in_features, out_features
        self.quant_type, self.double_quant = quant_type, double_quant
        self.compute_dtype = compute_dtype
        kind = scheme(quant_type)
        self.blocksize = blocksize = kind.blocksize(blocksize, in_features)
        count = in_features * out_features
        weight = torch.zeros(packed_bytes(count, kind.bits), dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        blocks = -(-count // blocksize)
        for name in ("scales", "shifts") if kind.scaling == "range" else ("scales",):
            dtype = torch.uint8 if double_quant else torch.float32
            self.register_buffer(name, torch.zeros(blocks, dtype=dtype, device=device))
            if double_quant:
                for part, size in (("absmax", -(-blocks // SCALES_BLOCKSIZE)), ("offset", 1)):
                    self.register_buffer(f"{name}_{part}", torch.zeros(size, dtype=torch.float32, device=device))
        self.register_buffer("codebook", codebook(quant_type, device, blocksize))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, dtype=compute_dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        return frozen_linear(_Products(self), x.to(dtype), self.bias, dtype)

    @property
    def rotated(self) -> bool:
        """Whether the codes are those of rotated rows."""
        return scheme(self.quant_type).rotated

    def store_(self, quantized: Quantized) -> None:
        """Take the codes, scales and table of ``quantized``, which must be of this module's type and blocksize."""
        codes = pack(quantized.codes, scheme(self.quant_type).bits)
        if self.weight.is_meta or self.weight.device != codes.device:
            self.weight = nn.Parameter(codes, requires_grad=False)
        else:  # the parameter stays the one that others may hold
            self.weight.data = codes
        for name, stored in (("scales", quantized.stored_scales), ("shifts", quantized.stored_shifts)):
            if stored is not None:
                parts = {name: stored.values, f"{name}_absmax": stored.absmax, f"{name}_offset": stored.offset}
                for part, values in parts.items():
                    if values is not None:
                        setattr(self, part, values.clone())
        self.codebook = quantized.table()

    def stored_scales(self, name: str = "scales") -> Scales | None:
        """The block scales or "shifts" as stored; None for shifts that the type doesn't have."""
        values = getattr(self, name, None)
        if values is None:
            return None
        return Scales(values, getattr(self, f"{name}_absmax", None), getattr(self, f"{name}_offset", None))

    def reset_parameters(self) -> None:
        """Nothing: the weight is stored, never drawn."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        # A cast of the model, `.half()` say, must round neither codes nor scales; moves to a device come through.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        codes = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype != codes.dtype:
            self.weight = nn.Parameter(codes.to(self.weight.device), requires_grad=False)
        for name, before in exact.items():
            after = self._buffers[name]
            assert after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        cast = fn(torch.empty(0, dtype=self.compute_dtype, device=codes.device)).dtype
        if cast.is_floating_point:
            self.compute_dtype = cast
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}"
        )


def packed_matrix(module: PackedLinear) -> kernels.PackedMatrix:
    """What ``module`` stores as data, in its own memory: of a rotated type, the rotated weight."""
    scales = module.stored_scales()
    assert scales is not None
    return kernels.PackedMatrix(
        module.weight.data,
        scheme(module.quant_type).bits,
        (module.out_features, module.in_features),
        module.blocksize,
        module.codebook,
        scales,
        module.stored_scales("shifts"),
        dynamic_table(scales.values) if module.double_quant else None,
    )


@dataclass(frozen=True)
class _Products:
    """Products with what ``module`` stores when they are computed."""

    module: PackedLinear

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = rotate(x) if self.module.rotated else x
        return kernels.linear(x, packed_matrix(self.module), bias)

    def gradient(self, grad: Tensor) -> Tensor:
        return _own_basis(self.module, kernels.gradient(grad, packed_matrix(self.module)))


def _own_basis(module: PackedLinear, rows: Tensor) -> Tensor:
    """Rows (..., in) of ``module``'s stored matrix, or of gradients through it, in the basis of its inputs."""
    return unrotate(rows) if module.rotated else rows


@register_codec(PackedLinear)
class PackedCodec(Codec):
    """``PackedLinear``: reads by looking whole groups of codes up, writes by quantizing anew."""

    name = "packed"

    def reason_against(self, module: Any) -> str | None:
        return reason_against_computed(module)

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def read(self, module: Any) -> Tensor:
        matrix = packed_matrix(module)
        whole = torch.empty(matrix.numel, dtype=torch.float32, device=matrix.codes.device)
        return _own_basis(module, Reader(matrix).read_(0, whole).view(matrix.shape))

    def pieces(self, module: Any) -> Iterator[tuple[slice, Tensor]]:
        reader = Reader(packed_matrix(module))
        for rows in row_pieces(self.shape(module)):
            yield rows, _own_basis(module, reader.rows(rows))

    def multiplier(self, module: Any, dtype: torch.dtype) -> Tensor:
        return kernels.dense(packed_matrix(module), dtype)

    def to_basis(self, module: Any, x: Tensor) -> Tensor:
        return rotate(x) if module.rotated else x

    def from_basis(self, module: Any, x: Tensor) -> Tensor:
        return _own_basis(module, x)

    def quantizer(self, module: Any) -> Quantizer:
        known = module.stored_scales().read() if module.rotated and not module.weight.is_meta else None
        return Quantizer(module.quant_type, module.blocksize, module.double_quant, known)

    def quantized(self, module: Any) -> Quantized:
        shape = self.shape(module)
        codes = unpack(module.weight.data, scheme(module.quant_type).bits, shape[0] * shape[1]).view(shape)
        shifts = module.stored_scales("shifts")
        return Quantized(module.quant_type, codes, module.stored_scales(), shifts, module.blocksize, None)

    @torch.no_grad()
    def write_(self, module: Any, weight: Tensor) -> None:
        weight = checked_weight(module, weight, self.shape(module), torch.float32).float()
        self.take_(module, self.quantizer(module)(weight))

    @torch.no_grad()
    def take_(self, module: Any, quantized: Quantized) -> None:
        module.store_(quantized)

    def release_(self, module: Any) -> None:
        super().release_(module)
        for name, buffer in module._buffers.items():
            setattr(module, name, buffer.new_empty(0))

    def stored(self, module: Any) -> list[Tensor]:
        return [module.weight.data, *module._buffers.values()]

    def compute_dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def contents(self, module: Any) -> Any:
        return module.weight.data, dict(module._buffers)

    @torch.no_grad()
    def restore_(self, module: Any, snapshot: Any) -> None:
        codes, buffers = snapshot
        device = module.weight.device
        module.weight.data = codes.to(device, copy=True)
        for name, buffer in buffers.items():
            setattr(module, name, buffer.to(device, copy=True))

    def linear_dtypes(self, module: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        dtype = autocast_dtype(x)
        return dtype, dtype

    def dense_like(self, module: Any, dtype: torch.dtype) -> nn.Module:
        return dense_linear(module, self.read(module), dtype)


def pack_linear(linear: nn.Linear, quantized: Quantized, *, compute_dtype: torch.dtype | None = None) -> PackedLinear:
    """A ``PackedLinear`` in ``linear``'s place that holds ``quantized``, on its device.

    Args:
        linear: gives the sizes, a copy of the bias, the training flag and, where ``compute_dtype`` is None, that.

    Raises:
        CodecError: the type's bits can't be packed.
    """
    assert quantized.blocksize is not None
    module = PackedLinear(
        linear.in_features,
        linear.out_features,
        bias=False,
        quant_type=quantized.quant_type,
        blocksize=quantized.blocksize,
        double_quant=quantized.double_quant,
        compute_dtype=compute_dtype or linear.weight.dtype,
        device="meta",
    )
    module.store_(quantized)
    take_bias_(module, linear)
    return module
