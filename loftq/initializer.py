"""``init_lora_weights="loftq"``: adapters that start where base + scaling * B @ A is closest to the full weight.

Two situations, told apart by how the base module keeps its weight:

- **Dense** (``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``): the alternation quantizes the weight
  and a module that holds the result takes the base's place: bitsandbytes' ``Linear4bit`` for NF4 and FP4, its
  ``Linear8bitLt`` for int8, our ``PackedLinear`` for the other types. Embeddings, which no layer here stores in
  fewer bits, are simulated: a module of the same type and dtype whose values are the quantized ones, with the
  numerics of low bits and the memory of the original.
- **Already quantized**: the base stays as it is, and the 16-bit weights of the same model are read lazily, a
  tensor at a time, from ``LoftQConfig.weights``. With Q fixed there is nothing to alternate: one decomposition
  of W - Q is the optimum.

The correction is always of what the new base really reads as: where storing rounds once more (a simulated
weight in bfloat16, say), the factors are fitted again to what is left.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.quantized import Quantized
from qlora_kit.config import DEFAULT_TYPES, LoftQConfig
from qlora_kit.errors import ConfigError, TargetError
from qlora_kit.initializers import Request, Start, register_initializer
from qlora_kit.originals import original_weight
from qlora_kit.quantize import linear_holding

from .alternate import correction
from .factorize import factorize
from .methods import norm
from .report import LayerReport

# Codecs of modules whose weight is not quantized yet.
DENSE = ("dense", "conv1d", "embedding")


@register_initializer("loftq")
@torch.no_grad()
def loftq_start(request: Request) -> Start:
    """The start of one module, from ``request.config.loftq_config`` (its defaults where it is None).

    Raises:
        TargetError: a convolution, or a module whose weight isn't in memory.
        ConfigError: an option can't work here, or the weight holds a NaN or infinity; names the path.
        StorageError: the 16-bit weights are missing or belong to another model.
    """
    options = request.config.loftq_config or LoftQConfig()
    if request.family == "conv":
        raise TargetError(
            f"{request.path}: expected a linear layer or an embedding for init_lora_weights='loftq', found "
            f"{type(request.base).__name__}, of which there is no quantized module; take it out of target_modules "
            "or give it an adapter of its own with init_lora_weights=True"
        )
    if request.codec.device(request.base).type == "meta":
        raise TargetError(
            f"{request.path}: expected a weight in memory for init_lora_weights='loftq', found one on the meta "
            "device; load the model's weights first, or use init_lora_weights=True"
        )
    try:
        if request.codec.name in DENSE:
            return quantized_start(request, options)
        return _residual_start(request, options)
    except ConfigError as error:
        raise ConfigError(f"{request.path}: {error}") from error


def quantized_start(request: Request, options: LoftQConfig) -> Start:
    """Alternate on a dense weight; the start brings the quantized base and a ``LayerReport``."""
    began = time.monotonic()
    weight = request.codec.read(request.base)
    result = factorize(
        weight,
        request.rank,
        quant_type=options.quant_type or DEFAULT_TYPES[options.loftq_bits],
        steps=options.loftq_iter,
        scaling=request.scaling,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
        method=options.method,
        seed=options.seed,
    )
    A, B, base = result.A, result.B, _deployed(request, result.quantized)
    residual = codec_for(base, request.path).read(base)
    agrees = torch.equal(residual, result.quantized.dequantize())
    residual = torch.sub(weight, residual, out=residual)
    if not agrees:
        A, B = correction(residual, request.rank, request.scaling, seed=options.seed)
    report = _measured(
        request,
        base,
        weight,
        residual,
        (A, B),
        quant_type=result.quantized.quant_type,
        steps=len(result.history),
        zero_error=result.zero_error,
        seconds=time.monotonic() - began,
    )
    return Start(A, B, base, report)


def _measured(
    request: Request, base: nn.Module, weight: Tensor, residual: Tensor, factors: tuple[Tensor, Tensor], **known: Any
) -> LayerReport:
    """The errors of what is stored; ``residual``, which is W - Q, is used up."""
    size = norm(weight) or 1.0
    quantization_error = norm(residual) / size
    A, B = factors
    return LayerReport(
        path=request.path,
        bits=8 * codec_for(base).nbytes(base) / weight.numel(),
        rank=request.rank,
        quantization_error=quantization_error,
        error=norm(residual.addmm_(B, A, alpha=-request.scaling)) / size,
        **{"zero_error": quantization_error, **known},
    )


def _deployed(request: Request, quantized: Quantized) -> nn.Module:
    """The module that holds ``quantized`` in the base's place."""
    base = request.base
    if request.family == "linear":
        return linear_holding(base, quantized)
    # A copy with a weight of its own; the memo keeps the old weight from being copied on the way.
    weight: Tensor = base.weight  # type: ignore[assignment]
    fresh = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
    simulated = copy.deepcopy(base, {id(weight): fresh})
    request.codec.write_(simulated, quantized.dequantize())
    return simulated


def _residual_start(request: Request, options: LoftQConfig) -> Start:
    """One decomposition of W - Q; the base stays."""
    if options.weights is None:
        raise ConfigError(
            f"loftq_config.weights: expected the folder with the 16-bit safetensors of this model, since the module "
            f"is already quantized ({request.codec.name}), found None; pass LoftQConfig(weights=folder), or load "
            "the model in 16 bits and let the start quantize it"
        )
    began = time.monotonic()
    stored = request.codec.read(request.base)
    full = original_weight(options.weights, request.path, stored)
    residual = torch.sub(full, stored, out=stored)
    A, B = correction(residual, request.rank, request.scaling, seed=options.seed)
    seconds = time.monotonic() - began
    kind = getattr(request.base.weight, "quant_type", None) or getattr(request.base, "quant_type", request.codec.name)
    report = _measured(request, request.base, full, residual, (A, B), quant_type=kind, steps=1, seconds=seconds)
    return Start(A, B, report=report)
