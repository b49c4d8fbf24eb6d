"""A quantized matrix as data: codes, scales, and what reads them back. No modules here.

``quantize_matrix`` finds what all deployed layers hold, bitsandbytes' and our packed ones: its codes and scales for
NF4, FP4 and int8 are bitsandbytes', bit for bit. Double quantization takes the nearest 8-bit scale; bitsandbytes' CPU
kernel takes the neighbour for the few scales in a thousand that lie within 1e-5 of a midpoint, so its layers have it
quantize ``exact_scales`` itself (``bnb.quant_state``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..errors import CodecError, ConfigError
from ..kernels.window import look_up
from .blockwise import dequantize, quantize, quantize_range
from .codebooks import Scheme, codebook, scheme
from .pieces import row_pieces
from .trellis.fit import nearest
from .trellis.rotation import rotate, unrotate

# The scales of a weight are themselves quantized in blocks of 256, as in bitsandbytes.
SCALES_BLOCKSIZE = 256
# The blocks that bitsandbytes' kernels for NF4 and FP4 take.
BNB_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Scales:
    """Block scales (or shifts) as stored.

    Attributes:
        values: float32 scales, or their uint8 codes after double quantization.
        absmax, offset: then float32 (blocks of 256,) and (1,): scale = dynamic_map[code] * absmax + offset.
    """

    values: Tensor
    absmax: Tensor | None = None
    offset: Tensor | None = None

    @classmethod
    def of(cls, scales: Tensor, double_quant: bool) -> Scales:
        """Store float32 (blocks,) ``scales``, in 8 bits less their mean if ``double_quant``."""
        if not double_quant:
            return cls(scales)
        offset = scales.mean()
        if not offset.isfinite():
            raise CodecError(
                f"weight: expected scales whose sum float32 can hold for double quantization, found up to "
                f"{scales.abs().max():.4g}; scale the weight down, or leave double_quant out"
            )
        codes, absmax = quantize(scales - offset, dynamic_table(scales), SCALES_BLOCKSIZE)
        return cls(codes, absmax, offset[None])

    def read(self) -> Tensor:
        """float32 (blocks,)."""
        if self.absmax is None or self.offset is None:
            return self.values
        table = dynamic_table(self.values)
        return dequantize(self.values, table, self.absmax, SCALES_BLOCKSIZE) + self.offset


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix.

    Attributes:
        quant_type: a name of ``codebooks.SCHEMES``, or "int8" (row scales, value = code * scale / 127).
        codes: (out, in), uint8 for tables, int8 for "int8".
        stored_scales, stored_shifts: of blocks of ``blocksize`` values in row-major order, or of rows; shifts
            only for ranges.
        blocksize: values per scale; None for the rows of int8.
        rows: the blocks were asked for as rows.
        exact_scales: float32 (blocks,), the scales before double quantization where the codes are the nearest to
            these; None where codes or scales were chosen in another way, for the scales as they are read then.
    """

    quant_type: str
    codes: Tensor
    stored_scales: Scales
    stored_shifts: Scales | None
    blocksize: int | None
    exact_scales: Tensor | None = field(repr=False)
    rows: bool = False

    @property
    def scales(self) -> Tensor:
        """The scales as they are read: float32."""
        return self.stored_scales.read()

    @property
    def shifts(self) -> Tensor | None:
        return None if self.stored_shifts is None else self.stored_shifts.read()

    @property
    def double_quant(self) -> bool:
        """Whether the scales went through 8 bits."""
        return self.stored_scales.absmax is not None

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.blocksize is None else scheme(self.quant_type).bits

    def table(self) -> Tensor:
        """float32 (2^memory,): the levels by code; int8 has none."""
        return codebook(self.quant_type, self.codes.device, self.blocksize or 0)

    def dequantize(self, *, out: Tensor | None = None) -> Tensor:
        """The matrix that the deployed layer multiplies with: float32 (out, in), in the memory of ``out`` if given."""
        if self.blocksize is None:
            return torch.mul(self.codes.float(), self.scales[:, None] / 127.0, out=out)
        if scheme(self.quant_type).rotated:
            return self._unrotated(torch.empty_like(self.codes, dtype=torch.float32) if out is None else out)
        return dequantize(self.codes, self.table(), self.scales, self.blocksize, self.shifts, out=out)

    def _unrotated(self, out: Tensor) -> Tensor:
        table, scales = self.table(), self.scales
        for rows in row_pieces(self.codes.shape):
            out[rows] = unrotate(look_up(self.codes[rows], table, self.bits).mul_(scales[rows, None]))
        return out

    def tensors(self) -> Iterator[Tensor]:
        """All that is stored of the scales, for counting bytes."""
        for part in (self.stored_scales, self.stored_shifts):
            if part is not None:
                yield from (t for t in (part.values, part.absmax, part.offset) if t is not None)


def quantize_matrix(
    matrix: Tensor,
    quant_type: str,
    blocksize: int | None = 64,
    *,
    double_quant: bool = False,
    known_scales: Tensor | None = None,
) -> Quantized:
    """Quantize a finite float32 (out, in) matrix.

    Args:
        quant_type: a name of ``codebooks.SCHEMES`` or "int8".
        blocksize: values per scale, None for one scale a row; int8 and rotated types always have rows.
        double_quant: keep scales and shifts in 8 bits; not with int8.
        known_scales: float32 (out,), of a rotated type: what rows may have been stored with before, see ``nearest``.

    A matrix on the meta device has no values: codes and scales are of the right shapes and dtypes, there too.

    Raises:
        CodecError: an unknown type, or a magnitude that int8 can't take.
    """
    kind = None if quant_type == "int8" else scheme(quant_type)
    if matrix.is_meta:
        return _without_values(matrix, quant_type, kind, blocksize, double_quant)
    if kind is None:
        return _int8(matrix)
    rows, blocksize = not blocksize, kind.blocksize(blocksize, matrix.shape[1])
    table = codebook(quant_type, matrix.device, blocksize)
    if kind.rotated:
        codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
        scales = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
        # Elsewhere than on a CPU the search wants many rows beside one another.
        for part in row_pieces(matrix.shape) if matrix.device.type == "cpu" else [slice(0, len(matrix))]:
            known = None if known_scales is None else known_scales[part]
            codes[part], scales[part] = nearest(rotate(matrix[part].float()), table, kind.bits, known)
        return Quantized(quant_type, codes, Scales.of(scales, double_quant), None, blocksize, None, True)
    if kind.scaling == "range":
        codes, scales, shifts = quantize_range(matrix, table, blocksize)
    else:
        signed, multipliers = kind.scaling == "signed", kind.multipliers(blocksize)
        codes, scales = quantize(matrix, table, blocksize, signed=signed, multipliers=multipliers)
        shifts = None
    stored = Scales.of(scales, double_quant), None if shifts is None else Scales.of(shifts, double_quant)
    return Quantized(quant_type, codes, *stored, blocksize, scales, rows)


def _without_values(
    matrix: Tensor, quant_type: str, kind: Scheme | None, blocksize: int | None, double_quant: bool
) -> Quantized:
    if kind is None:
        codes, scales = matrix.to(torch.int8), matrix.new_empty(len(matrix), dtype=torch.float32)
        return Quantized("int8", codes, Scales(scales), None, None, scales, True)
    rows, blocksize = not blocksize or kind.rotated, kind.blocksize(blocksize, matrix.shape[1])
    scales = matrix.new_empty(-(-matrix.numel() // blocksize), dtype=torch.float32)
    stored = Scales(scales)
    if double_quant:
        absmax = scales.new_empty(-(-len(scales) // SCALES_BLOCKSIZE))
        stored = Scales(scales.to(torch.uint8), absmax, scales.new_empty(1))
    shifts = stored if kind.scaling == "range" else None
    return Quantized(quant_type, matrix.to(torch.uint8), stored, shifts, blocksize, scales, rows)


@dataclass(frozen=True)
class Quantizer:
    """Plain rounding to the nearest codes: from a finite float32 (out, in) matrix to its ``Quantized``.

    Attributes:
        quant_type: a name of ``codebooks.SCHEMES`` or "int8".
        blocksize: values per scale; None for rows.
        double_quant: scales in 8 bits.
        known_scales: see ``quantize_matrix``.
    """

    quant_type: str
    blocksize: int | None
    double_quant: bool = False
    known_scales: Tensor | None = field(default=None, repr=False, compare=False)

    def __call__(self, matrix: Tensor) -> Quantized:
        try:
            known = None if self.known_scales is None else self.known_scales.to(matrix.device)
            return quantize_matrix(
                matrix, self.quant_type, self.blocksize, double_quant=self.double_quant, known_scales=known
            )
        except CodecError as error:
            raise ConfigError(str(error)) from error


def _int8(matrix: Tensor) -> Quantized:
    # bitsandbytes rounds the weight to float16 first, and multiplies by 127 / absmax rather than dividing.
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    scales = torch.empty(len(matrix), dtype=torch.float32, device=matrix.device)
    for rows in row_pieces(matrix.shape):
        half = matrix[rows].half()
        if not torch.isfinite(half).all():
            raise CodecError(
                f"matrix: expected magnitudes below 65504 for int8, found {matrix.abs().max():.4g}; bitsandbytes "
                "quantizes from float16, so use 4 bits or leave the module out of the targets"
            )
        scale = half.abs().amax(dim=1).float()
        inverse = torch.where(scale > 0, 127.0 / scale, torch.zeros_like(scale))
        codes[rows] = torch.mul(half, inverse[:, None]).round_()
        scales[rows] = scale
    return Quantized("int8", codes, Scales(scales), None, None, scales, True)


def _dynamic_map() -> tuple[float, ...]:
    values = [0.0, 1.0]
    for power in range(7):
        grid = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device="cpu")
        means = (grid[:-1] + grid[1:]) / 2
        values += (10.0 ** (power - 6) * means).tolist() + (-(10.0 ** (power - 6)) * means).tolist()
    return tuple(sorted(values))


# The 256 ascending values of the signed dynamic data type (Dettmers 2016, arXiv 1511.04561): for each decade 10^-6 to
# 10^0, 2^i midpoints of an even grid from 0.1 to 1, i = 0 to 6, with both signs; and 0 and 1. A constant, for code that
# torch.compile traces can make no values.
DYNAMIC_MAP = _dynamic_map()


def dynamic_table(like: Tensor) -> Tensor:
    """``DYNAMIC_MAP`` as float32 (256,) on the device of ``like``. Kept there, for copying it again would wait for all
    of the device's work; but made anew for tensors that are traced, which mix with none that have values."""
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=like.device)
    return _kept_table(like.device)


@cache
def _kept_table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it outlives the mode
        return torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=device)
