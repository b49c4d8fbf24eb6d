"""The quantizers that the alternation runs with: float32 matrix in, codes and scales out.

They are the ones deployed: NF4 and FP4 give bitsandbytes' codes and scales (``qlora_kit.codecs.blockwise``),
int8 its row-wise codes, so that the error which the alternation measures is the error of the layer that will
run. Double quantization takes the nearest 8-bit scale; bitsandbytes' CPU kernel takes the neighbour for the few
scales in a thousand that lie within 1e-5 of a midpoint, for which ``loftq.initializer`` corrects afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qlora_kit.codecs.blockwise import CODEBOOKS, codebook, dequantize, quantize
from qlora_kit.errors import ConfigError

# What ``bits`` alone means.
DEFAULT_TYPES = {2: "nf2", 3: "nf3", 4: "nf4", 8: "int8"}
# bitsandbytes quantizes the scales of a weight in blocks of 256.
SCALES_BLOCKSIZE = 256


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        quant_type: "nf4", "fp4", "int8", ... : the table or the scheme.
        codes: (out, in), uint8 for tables, int8 for "int8".
        scales: float32, as read: one a block of ``blocksize`` values in row-major order, or one a row.
        blocksize: values per scale; None for rows.
        double_quant: the scales went through 8 bits.
        source: float32 (out, in), the matrix that was quantized. Quantizing it again, with the same quantizer,
            gives these codes, which quantizing ``dequantize()`` only does without double quantization.
    """

    quant_type: str
    codes: Tensor
    scales: Tensor
    blocksize: int | None
    double_quant: bool
    source: Tensor

    def dequantize(self) -> Tensor:
        """The matrix that the deployed layer multiplies with: float32 (out, in)."""
        if self.blocksize is None:
            return self.codes.float() * (self.scales[:, None] / 127.0)
        return dequantize(self.codes, codebook(self.quant_type, self.codes.device), self.scales, self.blocksize)


Quantizer = Callable[[Tensor], Quantized]


def quantizer_for(
    *, bits: int = 4, quant_type: str | None = None, blocksize: int = 64, double_quant: bool = False
) -> Quantizer:
    """The function from a finite float32 (out, in) matrix to its ``Quantized``.

    Args:
        bits: 2, 3, 4 or 8; means NormalFloat of that many bits, and int8 for 8.
        quant_type: a table of ``blockwise.CODEBOOKS`` or "int8"; stands above ``bits``.
        blocksize: values per scale; int8 has one scale a row whatever it says.
        double_quant: keep the scales in 8 bits, as bitsandbytes' nested quantization does.

    Raises:
        ConfigError: an option isn't in the table or doesn't go with another.
    """
    if quant_type is None:
        if isinstance(bits, bool) or bits not in DEFAULT_TYPES:
            raise ConfigError(
                f"bits: expected one of {list(DEFAULT_TYPES)}, found {bits!r}; pick one of these or pass quant_type"
            )
        quant_type = DEFAULT_TYPES[bits]
    if quant_type not in (*CODEBOOKS, "int8"):
        known = ", ".join([*CODEBOOKS, "int8"])
        raise ConfigError(f"quant_type: expected one of {known}, found {quant_type!r}; pick one of these")
    if isinstance(blocksize, bool) or not isinstance(blocksize, int) or blocksize < 1:
        raise ConfigError(f"blocksize: expected a positive integer, found {blocksize!r}; pass blocksize=64")
    if quant_type == "int8":
        if double_quant:
            raise ConfigError(
                "double_quant: expected False with int8, which has one scale a row, found True; leave it out"
            )
        return _int8
    kind = quant_type

    def blockwise(matrix: Tensor) -> Quantized:
        codes, scales = quantize(matrix, codebook(kind, matrix.device), blocksize)
        if double_quant:
            scales = _through_8_bits(scales)
        return Quantized(kind, codes, scales, blocksize, double_quant, matrix)

    return blockwise


def _int8(matrix: Tensor) -> Quantized:
    # bitsandbytes rounds the weight to float16 first, and multiplies by 127 / absmax rather than dividing.
    half = matrix.half()
    if not torch.isfinite(half).all():
        raise ConfigError(
            f"matrix: expected magnitudes below 65504 for int8, found {matrix.abs().max():.4g}; bitsandbytes "
            "quantizes from float16, so use 4 bits or leave the module out of the targets"
        )
    scales = half.abs().amax(dim=1).float()
    inverse = torch.where(scales > 0, 127.0 / scales, torch.zeros_like(scales))
    codes = torch.round(half * inverse[:, None]).to(torch.int8)
    return Quantized("int8", codes, scales, None, False, matrix)


def _through_8_bits(scales: Tensor) -> Tensor:
    """Scales as they are read back after double quantization: less their mean, in blocks of 256."""
    offset = scales.mean()
    table = torch.tensor(dynamic_map(), dtype=torch.float32, device=scales.device)
    codes, outer = quantize(scales - offset, table, SCALES_BLOCKSIZE)
    return dequantize(codes, table, outer, SCALES_BLOCKSIZE) + offset


@cache
def dynamic_map() -> tuple[float, ...]:
    """The 256 ascending values of the signed dynamic data type (Dettmers 2016, arXiv 1511.04561).

    For each decade 10^-6 to 10^0, 2^i midpoints of an even grid from 0.1 to 1, i = 0 to 6, with both signs;
    and 0 and 1.
    """
    values = [0.0, 1.0]
    for power in range(7):
        grid = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32)
        means = (grid[:-1] + grid[1:]) / 2
        values += (10.0 ** (power - 6) * means).tolist() + (-(10.0 ** (power - 6)) * means).tolist()
    return tuple(sorted(values))
