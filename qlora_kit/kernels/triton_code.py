"""Triton kernels for packed weights: dequantize to a dense matrix, and multiply while dequantizing.

Every code is found by its flat index i, whatever straddles what: it takes the bits i * bits and on of the bytes, so it
lies in one byte or, with 3 bits, in two. A value that depends on codes before its own (``window``) is looked up
by the bits of all of these, which are as easily found. Its scale is that of block i // blocksize; doubly quantized
scales are read where they are needed, since a launch of its own for them would cost more than the few bytes.

Arithmetic is float32: table value times scale plus shift, then one rounding to the output's (or the other factor's)
dtype; products are summed in float32, without TF32 for float32 factors.

A tile of the weight has its rows along the first axis, so that neighbouring threads read neighbouring bytes. Indices
are of 32 bits where all bits of the matrix can be counted in these, else of 64 (``INDEX``).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _code(codes, index, mask, BITS: tl.constexpr):
    place = index * BITS
    shift = (place & 7).to(tl.int32)
    code = tl.load(codes + (place >> 3), mask=mask, other=0).to(tl.int32)
    if BITS == 3:  # the other widths end where bytes do
        code |= tl.load(codes + (place >> 3) + 1, mask=mask & (shift > 5), other=0).to(tl.int32) << 8
    return (code >> shift) & ((1 << BITS) - 1)


@triton.jit
def _window(codes, index, row, width, mask, BITS: tl.constexpr, MEMORY: tl.constexpr):
    """The last ``MEMORY`` bits of the row up to the code at ``index``, its own the highest."""
    begin = (index + 1) * BITS - MEMORY
    missing = tl.maximum(row * width * BITS - begin, 0).to(tl.int32)  # before its row's first code there are zeros
    held = MEMORY - missing
    place = begin + missing
    shift = (place & 7).to(tl.int32)
    bits = tl.load(codes + (place >> 3), mask=mask, other=0).to(tl.int32)
    for byte in tl.static_range(1, (MEMORY + 14) // 8):
        there = mask & (shift + held > 8 * byte)
        bits |= tl.load(codes + (place >> 3) + byte, mask=there, other=0).to(tl.int32) << (8 * byte)
    return ((bits >> shift) & ((1 << held) - 1)) << missing


@triton.jit
def _scale(values, absmax, offset, scales_table, block, mask, DOUBLE: tl.constexpr):
    if DOUBLE:
        code = tl.load(values + block, mask=mask, other=0).to(tl.int32)
        inner = tl.load(absmax + block // 256, mask=mask, other=0.0)
        return tl.load(scales_table + code) * inner + tl.load(offset)
    else:
        return tl.load(values + block, mask=mask, other=0.0)


@triton.jit
def _weight(
    index,
    block,
    mask,
    block_mask,
    blocksize,
    codes,
    table,
    scales,
    scales_absmax,
    scales_offset,
    shifts,
    shifts_absmax,
    shifts_offset,
    scales_table,
    BITS: tl.constexpr,
    MEMORY: tl.constexpr,
    DOUBLE: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """float32 values of the codes at ``index``, 0 where ``mask`` is not; ``block`` may have one column for a row."""
    if MEMORY > BITS:  # blocks are rows then
        value = tl.load(table + _window(codes, index, block, blocksize, mask, BITS, MEMORY))
    else:
        value = tl.load(table + _code(codes, index, mask, BITS))
    value *= _scale(scales, scales_absmax, scales_offset, scales_table, block, block_mask, DOUBLE)
    if SHIFTED:
        value += _scale(shifts, shifts_absmax, shifts_offset, scales_table, block, block_mask, DOUBLE)
    return tl.where(mask, value, 0.0)


@triton.jit
def dequantize(
    out,
    numel,
    blocksize,
    codes,
    table,
    scales,
    scales_absmax,
    scales_offset,
    shifts,
    shifts_absmax,
    shifts_offset,
    scales_table,
    BITS: tl.constexpr,
    MEMORY: tl.constexpr,
    DOUBLE: tl.constexpr,
    SHIFTED: tl.constexpr,
    INDEX: tl.constexpr,
    TILE: tl.constexpr,
):
    """``TILE`` values of flat ``out`` a program, in its dtype."""
    index = tl.program_id(0).to(INDEX) * TILE + tl.arange(0, TILE)
    mask = index < numel
    block = index // blocksize
    value = _weight(
        index, block, mask, mask, blocksize, codes, table, scales, scales_absmax, scales_offset,
        shifts, shifts_absmax, shifts_offset, scales_table, BITS, MEMORY, DOUBLE, SHIFTED,
    )  # fmt: skip
    tl.store(out + index, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def multiply(
    x,
    out,
    rows,
    outs,
    terms,
    terms_a_part,
    width,
    blocksize,
    codes,
    table,
    scales,
    scales_absmax,
    scales_offset,
    shifts,
    shifts_absmax,
    shifts_offset,
    scales_table,
    BITS: tl.constexpr,
    MEMORY: tl.constexpr,
    DOUBLE: tl.constexpr,
    SHIFTED: tl.constexpr,
    INDEX: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    TERMS: tl.constexpr,
):
    """A tile (``ROWS``, ``OUTS``) of a part of the sums x W^T, or of x W if ``TRANSPOSED``.

    x (rows, terms) and the float32 partial sums out (parts, rows, outs) are contiguous; ``terms_a_part`` is a multiple
    of ``TERMS``. ``ONE_BLOCK``: what a tile of the weight takes of a row always lies in one block.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    begin = tl.program_id(2) * terms_a_part
    total = tl.full((ROWS, OUTS), 0.0, tl.float32)
    for start in range(begin, tl.minimum(begin + terms_a_part, terms), TERMS):
        term = start + tl.arange(0, TERMS)
        places = row.to(tl.int64)[:, None] * terms + term[None, :]
        factor = tl.load(x + places, mask=(row < rows)[:, None] & (term < terms)[None, :], other=0.0)
        if TRANSPOSED:
            first, first_mask = term, term < terms
            second, second_mask, corner = o, o < outs, tl.program_id(0) * OUTS
        else:
            first, first_mask = o, o < outs
            second, second_mask, corner = term, term < terms, start
        begins = first.to(INDEX)[:, None] * width  # the rows of the weight
        index, mask = begins + second[None, :], first_mask[:, None] & second_mask[None, :]
        if ONE_BLOCK:
            block, block_mask = (begins + corner) // blocksize, first_mask[:, None]
        else:
            block, block_mask = index // blocksize, mask
        weight = _weight(
            index, block, mask, block_mask, blocksize, codes, table, scales, scales_absmax, scales_offset,
            shifts, shifts_absmax, shifts_offset, scales_table, BITS, MEMORY, DOUBLE, SHIFTED,
        ).to(factor.dtype)  # fmt: skip
        if not TRANSPOSED:
            weight = tl.trans(weight)
        total = tl.dot(factor, weight, total, input_precision="ieee")
    place = (tl.program_id(2).to(tl.int64) * rows + row.to(tl.int64)[:, None]) * outs + o[None, :]
    tl.store(out + place, total, mask=(row < rows)[:, None] & (o < outs)[None, :])
