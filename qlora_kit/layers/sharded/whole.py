"""A sharded module as one process would hold it, and quantized weights cut to a rank's part.

Starts look at a whole weight: a decomposition of half a matrix isn't half a decomposition. So a layer is gathered,
started as one process starts it, on every rank, and each keeps its part. A quantized weight is cut by its codes and
scales, which is exact: the parts read as the whole's do. Where blocks that share a scale would be cut in two it can't
be, and says so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...codecs import codec_for
from ...codecs.codebooks import scheme
from ...codecs.packed import PackedLinear, pack_linear
from ...codecs.quantized import SCALES_BLOCKSIZE, Quantized, Scales
from ...codecs.shards.view import is_tensor_parallel, resembling
from ...errors import CodecError
from .parts import cut, gathered
from .sharding import Sharding


@torch.no_grad()
def whole_module(module: Any, sharding: Sharding, *, values: bool = True) -> Any:
    """A module of ``module``'s type, settings and storage with the weight of all ranks, in memory of its own; every
    rank has to ask. Without ``values`` it is a dense one of its shapes and dtype, and nobody is told anything."""
    if is_tensor_parallel(module):
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        found: dict[str, Tensor] = {
            name: p.full_tensor() if values else torch.empty(p.shape, dtype=p.dtype, device="meta")
            for name, p in parameters.items()
        }
        return resembling(module, {name: nn.Parameter(t, requires_grad=False) for name, t in found.items()})
    codec = codec_for(module)
    (out_features, in_features), dtype = sharding.shape, codec.compute_dtype(module)
    bias = module._parameters.get("bias")
    like = nn.Linear(in_features, out_features, bias=bias is not None, device="meta", dtype=dtype).requires_grad_(False)
    like.train(module.training)
    if not values:
        return like
    if bias is not None:
        own = gathered(sharding, bias, sharding.factor_dims[1], out_features)
        like.bias = nn.Parameter(own.clone(), requires_grad=False)
    quantized = codec.quantized(module)
    if quantized is not None:
        return holding(like, gathered_codes(quantized, sharding), packed=isinstance(module, PackedLinear))
    weight = gathered(sharding, codec.read(module), sharding.dim, sharding.shape[sharding.dim])
    like.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return like


@torch.no_grad()
def part_of_module(whole: Any, sharding: Sharding) -> Any:
    """This rank's part of ``whole``, a linear layer of any storage, as a module of that.

    Raises:
        CodecError: few bits that can't be cut there; says what can.
    """
    if not isinstance(whole, nn.Linear):
        raise CodecError(
            f"{type(whole).__name__}: expected a linear layer to be cut to a part in a storage of its own, found "
            "one that isn't; leave it out of the targets of this start"
        )
    codec = codec_for(whole)
    bias = whole._parameters.get("bias")
    quantized = codec.quantized(whole)
    own = None if quantized is None else cut_codes(quantized, sharding)
    weight = cut(sharding, codec.read(whole), sharding.dim) if own is None else own.codes
    out_features, in_features = weight.shape
    dtype = codec.compute_dtype(whole)
    like = nn.Linear(in_features, out_features, bias=bias is not None, device="meta", dtype=dtype).requires_grad_(False)
    if bias is not None:
        own_bias = cut(sharding, bias.detach(), sharding.factor_dims[1]).clone()
        like.bias = nn.Parameter(own_bias, requires_grad=bias.requires_grad)
    like.train(whole.training)
    if own is not None:
        found = holding(like, own, packed=isinstance(whole, PackedLinear))
        if (source := vars(whole).get("source_cls")) is not None:  # the kind of linear that it stands in the place of
            found.source_cls = source
        return found
    like.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return like


def holding(linear: nn.Linear, quantized: Quantized, *, packed: bool) -> Any:
    """A module that holds ``quantized`` in the place of ``linear``: one of ours, or bitsandbytes'."""
    if packed:
        return pack_linear(linear, quantized)
    from ...codecs.bnb import linear_of_codes, linear_of_codes_int8

    return (linear_of_codes_int8 if quantized.blocksize is None else linear_of_codes)(linear, quantized)


def check_can_be_cut(sharding: Sharding, quant_type: str, blocksize: int | None, *, double_quant: bool) -> None:
    """Raise a CodecError unless a weight of these few bits is the same, cut and then quantized or the reverse.

    Args:
        blocksize: weights that share a scale; None for rows.
    """
    if sharding.size == 1:
        return
    (out_features, in_features), kind = sharding.shape, sharding.kind
    rows = blocksize is None or quant_type == "int8" or scheme(quant_type).rotated
    length = in_features if rows or blocksize is None else blocksize
    where = f"a {kind}-sharded layer of {out_features} x {in_features} on {sharding.size} processes"
    if double_quant:
        raise CodecError(
            f"{where}: expected scales that can be cut where the weight is, found double quantization, which keeps "
            f"{SCALES_BLOCKSIZE} of them together, less the mean of all; pass double_quant=False"
        )
    first = -(-sharding.shape[sharding.dim] // sharding.size) // sharding.pieces  # columns or rows of a piece
    run = first if kind == "row" else first * in_features  # weights that lie side by side in it
    if run % length or (kind == "row" and in_features % length):
        fits = [size for size in (256, 128, 64, 32, 16, 8) if run % size == 0 and in_features % size == 0]
        fix = "leave it out of the targets"
        if fits:
            fix = f"pass blocksize={fits[0]}"
            if rows:
                bits = 8 if quant_type == "int8" else scheme(quant_type).bits
                fix += f" and a type that has blocks, such as 'uniform{bits}'"
        what = "one for each whole row" if rows else f"blocks of {length} weights"
        raise CodecError(
            f"{where}: expected {quant_type} scales of weights that one process holds, found {what} where each holds "
            f"{run} side by side; {fix}"
        )


def cut_codes(quantized: Quantized, sharding: Sharding) -> Quantized:
    """This rank's part of ``quantized``.

    Raises:
        CodecError: see ``check_can_be_cut``.
    """
    blocksize = None if quantized.rows else quantized.blocksize
    check_can_be_cut(sharding, quantized.quant_type, blocksize, double_quant=quantized.double_quant)
    return _of_codes(quantized, cut(sharding, quantized.codes, sharding.dim), sharding, gather=False)


def gathered_codes(quantized: Quantized, sharding: Sharding) -> Quantized:
    """The whole of which ``quantized`` is this rank's part; every rank has to ask."""
    codes = gathered(sharding, quantized.codes, sharding.dim, sharding.shape[sharding.dim])
    return _of_codes(quantized, codes, sharding, gather=True)


def _of_codes(quantized: Quantized, codes: Tensor, sharding: Sharding, *, gather: bool) -> Quantized:
    """``quantized`` with other codes, and the scales that belong to these."""

    def scales(stored: Scales | None) -> Scales | None:
        return None if stored is None else Scales(_of_scales(stored.read(), quantized, codes, sharding, gather=gather))

    first = scales(quantized.stored_scales)
    assert first is not None
    kind, shifts = quantized.quant_type, scales(quantized.stored_shifts)
    return Quantized(kind, codes, first, shifts, quantized.blocksize, None, quantized.rows)


def _of_scales(scales: Tensor, quantized: Quantized, codes: Tensor, sharding: Sharding, *, gather: bool) -> Tensor:
    """float32 (blocks,), cut or gathered as the codes are."""
    length, size = quantized.blocksize, sharding.shape[sharding.dim]
    if sharding.size == 1:
        return scales
    if sharding.kind == "row":  # blocks lie within rows
        assert length is not None
        grid = scales.view(len(codes), -1)
        move = gathered(sharding, grid, 1, size // length) if gather else cut(sharding, grid, 1)
        return move.reshape(-1)
    per_row = sharding.shape[1] // (length or sharding.shape[1])
    if per_row and sharding.shape[1] % (length or sharding.shape[1]) == 0:
        grid = scales.view(-1, per_row)
        return (gathered(sharding, grid, 0, size) if gather else cut(sharding, grid, 0)).reshape(-1)
    return (
        gathered(sharding, scales, 0)
        if gather
        else cut(sharding, scales.view(sharding.size * sharding.pieces, -1), 0).reshape(-1)
    )
