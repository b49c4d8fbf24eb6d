"""A fixed orthogonal change of the inputs' basis: signs, then a Hadamard transform. It spreads outliers over a row and
makes weights look like independent normal values, which is what the trellis types' tables are fitted to (Tseng et al.
2024, QuIP#, arXiv 2402.04396; there the signs are drawn for each matrix).

A width is 2^k m with m odd. The transform is the Kronecker product of the Hadamard matrix of 2^k, taken in factors of
at most 16, and of the Hartley matrix of m, cas(2 pi i j / m) / sqrt(m) with cas = cos + sin. Both are symmetric and
orthogonal, so the way back is the same transform, and then the signs. The signs are bits of a hash of width and place:
the same in every process and version, and none need be stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import Parameter

from ..autocast import without_autocast

# Hadamard factors up to this, a product with each: on a CPU faster than larger ones and than butterflies.
_FACTOR = 16
# Values that are transformed at a time on a CPU, all steps in the cache.
_CHUNK = 1 << 17


def rotate(x: Tensor) -> Tensor:
    """``x`` (..., width) in the rotated basis, in its dtype; computed in float32, or float64 for float64."""
    signs, factors = _parts(x)
    return _in_pieces(lambda part: _transform(part.to(signs.dtype) * signs, factors).to(x.dtype), x)


def unrotate(x: Tensor) -> Tensor:
    """The inverse of ``rotate``."""
    signs, factors = _parts(x)
    return _in_pieces(lambda part: (_transform(part.to(signs.dtype), factors) * signs).to(x.dtype), x)


def _in_pieces(rotation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    width = x.shape[-1]
    rows = max(1, _CHUNK // max(1, width))
    if x.device.type != "cpu" or x.numel() <= rows * width or torch.compiler.is_compiling():
        return rotation(x)
    return torch.cat([rotation(part) for part in x.reshape(-1, width).split(rows)]).view(x.shape)


def _transform(x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    shape, x = x.shape, x.contiguous()
    sizes = [len(factor) for factor in factors]
    with without_autocast(x.device):
        for axis, factor in enumerate(factors):
            before, after = math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
            if len(factors) == 1 and sizes[0] % 2:
                # An odd width: the order of a row's sums depends on how many rows there are, which this rounds away.
                x = (x.double() @ factor.double()).to(x.dtype)
            elif after == 1:  # symmetric, so either side will do
                x = x.reshape(-1, sizes[axis]) @ factor
            else:
                x = factor @ x.reshape(-1, before, sizes[axis], after)
    return x.reshape(shape)


def _parts(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Signs and factors for rows like those of ``x``; remembered, but for tensors that have no values or are traced."""
    width, dtype = x.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.is_meta:
        sizes = _sizes(width)
        return x.new_empty(width, dtype=dtype), tuple(x.new_empty(size, size, dtype=dtype) for size in sizes)
    if type(x) not in (Tensor, Parameter) or torch.compiler.is_compiling():
        return _made(width, dtype, x.device)
    return _kept(width, dtype, x.device)


@cache
def _kept(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.inference_mode(False):  # it outlives the mode
        return _made(width, dtype, device)


def _made(width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    factors = [_hartley(size) if size % 2 else _hadamard(size) for size in _sizes(width)]
    return _signs(width).to(device, dtype), tuple(factor.to(device, dtype) for factor in factors)


def _sizes(width: int) -> list[int]:
    """Of the factors: the odd one, where there is one or nothing else, and powers of two."""
    twos = width & -width
    sizes = [] if twos == width and width > 1 else [width // twos] if twos else []
    while twos > 1:
        sizes.append(min(twos, _FACTOR))
        twos //= sizes[-1]
    return sizes


def _signs(width: int) -> Tensor:
    """float64 (width,), on the CPU: the lowest bits of 32-bit numbers that murmur3's last step (Appleby 2011) mixes."""
    mixed = torch.arange(width, device="cpu") + width * 0x9E3779B9
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = mixed & 0xFFFFFFFF
        mixed = (mixed ^ mixed >> shift) * factor
    return 1.0 - 2.0 * (mixed & 1).double()


def _hartley(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64, device="cpu")
    # The angle's multiple modulo the size, in whole numbers: large products would cost digits.
    angle = 2 * math.pi * (index[:, None] * index).remainder(size) / size
    return (angle.cos() + angle.sin()) / math.sqrt(size)


def _hadamard(size: int) -> Tensor:
    """Sylvester's, of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)
