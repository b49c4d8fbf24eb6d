"""Linear layers from dense storage to low bits, where they stand: bitsandbytes' or our packed modules.

``quantize_`` rounds each weight to its nearest codes, which is where a zero start (QLoRA) begins. LoftQ starts
(``init_lora_weights="loftq"``) quantize by themselves, another matrix than the weight, and put it into modules
by the same function.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from ...codecs import codec_for
from ...codecs.quantized import BNB_BLOCKSIZES, Quantized, quantize_matrix
from ...codecs.shards.tensors import engine_of
from ...codecs.shards.view import is_tensor_parallel, local_view
from ...config.checks import failure
from ...config.loftq import DEFAULT_TYPES
from ...config.lora import LoraConfig
from ...errors import CodecError, TargetError
from ...injection.engine import Injection, PlanEntry, make_plan, swap_, with_hooks_of
from ...injection.read_past import ReadPast
from ...injection.ties import refuse_tied
from ...layers.sharded.sharding import sharding_of
from ...layers.sharded.whole import check_can_be_cut, holding
from ...naming import Tree, module_at

# Codecs of linear modules whose weight is not quantized yet.
DENSE_LINEARS = ("dense", "conv1d")
Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def quantize_(
    model: Model,
    bits: int = 4,
    *,
    quant_type: str | None = None,
    blocksize: int | None = 64,
    double_quant: bool = False,
    target_modules: list[str] | str = "all-linear",
) -> Model:
    """Replace ``model``'s linear layers, in place, by quantized ones; all of them, or on any error none.

    Of a layer that several processes share each quantizes its part, which is what one process has there; where weights
    that share a scale lie in two parts, it is refused.

    The configuration of a transformers model says so from then on: ``model.save_pretrained`` writes what
    ``from_pretrained`` loads.

    Args:
        bits: 2, 3, 4 or 8: ``qlora_kit.config.loftq.DEFAULT_TYPES`` of it.
        quant_type: a type of ``qlora_kit.codecs.codebooks`` or "int8"; stands above ``bits``.
        blocksize: weights that share a scale; None for rows.
        double_quant: keep the scales in 8 bits.
        target_modules: which, as in ``LoraConfig``; "all-linear" leaves the head out, and all whose weight (or its
            dtype) the model reads past the layer, see ``qlora_kit.injection.read_past``: few bits would break these.

    Raises:
        ConfigError: a number of bits that no type has.
        TargetError: nothing is matched, or something that isn't a dense linear layer, or one that is named and whose
            weight nobody but others read.
        CodecError: an unknown type, or a weight that it can't hold; or FSDP2 or ZeRO-3 has the weights in pieces.
    """
    if quant_type is None and bits not in DEFAULT_TYPES:
        raise failure("bits", f"one of {list(DEFAULT_TYPES)}", bits, "pass bits=4, or a quant_type")
    if (engine := engine_of(model)) is not None:
        raise CodecError(
            f"quantize_: expected a model with whole weights, found one that {engine} has sharded; quantize before "
            "(from_pretrained shards too, once there is a ZeRO-3 configuration: load before "
            "TrainingArguments(deepspeed=...))"
        )
    kind = quant_type or DEFAULT_TYPES[bits]
    undo = Injection()
    try:
        for entry in _entries(model, target_modules):
            base = module_at(model, entry.path)
            if entry.codec not in DENSE_LINEARS:
                raise TargetError(
                    f"{entry.path}: expected a dense linear layer to quantize, found {type(base).__name__} "
                    f"({entry.codec}); take it out of target_modules"
                )
            matrix = codec_for(base, entry.path).read(base)
            try:
                if (sharding := sharding_of(base)) is not None:
                    check_can_be_cut(sharding, kind, blocksize, double_quant=double_quant)
                new = linear_holding(base, quantize_matrix(matrix, kind, blocksize, double_quant=double_quant))
            except CodecError as error:
                raise CodecError(f"{entry.path}: {error}") from error
            for path in (entry.path, *entry.aliases):
                swap_(model, path, with_hooks_of(base, new), undo)
        if hasattr(type(model), "save_pretrained"):
            from ...hf_quantizer import record_quantization_

            record_quantization_(model)
    except BaseException:
        undo.undo()
        raise
    return model


def _entries(model: nn.Module, targets: list[str] | str) -> list[PlanEntry]:
    """What ``targets`` select of ``model`` and few bits leave working."""
    tree = Tree(model)
    entries, past = make_plan(tree, LoraConfig(r=1, target_modules=targets)).entries, ReadPast(tree)
    refuse_tied(tree, [entry.path for entry in entries])
    if targets == "all-linear":
        found = [entry for entry in entries if past.get(entry.path) is None]
        if not found:
            raise TargetError("target_modules='all-linear': the weights of all linear layers are read past them")
        return found
    for entry in entries:
        read = past.get(entry.path)
        if read is not None and (read.needs_matrix or not read.value):
            raise TargetError(
                f"{entry.path}: expected a layer that computes all that its weight is for, found one that can't be "
                f"stored in few bits: {read.reason}; take it out of target_modules"
            )
    return list(entries)


def in_bitsandbytes(quant_type: str, blocksize: int | str | None) -> bool:
    """Whether bitsandbytes stores linears of this type; the others, and rows of any length, are packed by us."""
    return quant_type == "int8" or (quant_type in ("nf4", "fp4") and blocksize in BNB_BLOCKSIZES)


def linear_holding(base: nn.Module, quantized: Quantized, *, packed: bool = False) -> nn.Module:
    """A module that computes with ``quantized`` in the place of ``base``, a linear layer, ``Conv1D`` or sharded linear,
    however that is stored; with ``packed`` one of ours, whatever the type."""
    ours = packed or not in_bitsandbytes(quantized.quant_type, None if quantized.rows else quantized.blocksize)
    return codec_for(base).housed(base, holding(_as_linear(base), quantized, packed=ours))


def _as_linear(base: nn.Module) -> nn.Linear:
    """The base, or an ``nn.Linear`` of its sizes, bias, dtype and device in its place: over the same storage where that
    is dense, without any for a base that is quantized."""
    codec = codec_for(base)
    quantized = codec.quantizer(base) is not None
    base = local_view(base) if is_tensor_parallel(base) else base
    if isinstance(base, nn.Linear) and not quantized:
        return base
    out_features, in_features = codec.shape(base)
    bias: nn.Parameter | None = base.bias  # type: ignore[assignment]
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    if quantized:
        weight = torch.zeros((), dtype=codec.compute_dtype(base), device=codec.device(base)).expand(linear.weight.shape)
    else:
        weight = codec.matrix_of(base.weight)  # type: ignore[arg-type]
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(base.training)
