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
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kit.checkpoints.originals import original_weight
from qlora_kit.codecs import codec_for
from qlora_kit.codecs.quantized import Quantized
from qlora_kit.config.lora import LoftQConfig
from qlora_kit.errors import ConfigError
from qlora_kit.initializers import Request, Start
from qlora_kit.lowrank import delta, norm
from qlora_kit.training.preparation.quantize import linear_holding

from ..inputs.groups import Seen
from ..methods.alignment import damping_for
from ..methods.alternation import correction
from ..methods.factors import made
from ..methods.metric import Metric, output_norm
from ..methods.registry import needs_of
from .options import factorize_as, storage_of
from .report import LayerReport
from .startable import DENSE, checked


def loftq_start(request: Request) -> Start:
    """The start of one module on its own, from ``request.config.loftq_config`` (its defaults where it is None).

    Raises:
        ConfigError: the method needs the inputs of the whole model; besides, see ``start_of``.
    """
    options = request.config.loftq_config or LoftQConfig()
    if needs_of(options.chosen_method).statistics:
        raise ConfigError(
            f"{request.path}: expected method 'loftq' or 'pissa' for a module on its own, found "
            f"{options.chosen_method!r}, which looks at the inputs; start the whole model by apply_lora, or call "
            "loftq.factorize with statistics"
        )
    return start_of(request, options)


@torch.no_grad()
def start_of(
    request: Request, options: LoftQConfig, seen: Seen | None = None, changes: list[Tensor] | None = None
) -> Start:
    """The start of one module.

    Args:
        seen: what is known of its inputs; without it, methods that look at them do what "loftq" does.
        changes: if given, gets what the start does to the module: D = Q + sBA - W, float32 (out, in).

    Raises:
        TargetError: see ``checked``.
        ConfigError: an option can't work here, or the weight holds a NaN or infinity; names the path.
        StorageError: the 16-bit weights are missing or belong to another model.
    """
    checked(request)
    try:
        if request.codec.name in DENSE:
            return _quantized_start(request, options, seen, changes)
        start = _residual_start(request, options, seen)
    except ConfigError as error:
        raise ConfigError(f"{request.path}: {error}") from error
    if changes is not None:
        changes.append(delta(start.A, start.B, request.scaling))
    return start


def _quantized_start(request: Request, options: LoftQConfig, seen: Seen | None, changes: list[Tensor] | None) -> Start:
    """Alternate on a dense weight; the start brings the quantized base, which is read once, and a ``LayerReport``."""
    began = time.monotonic()
    weight = request.codec.read(request.base)
    kind, packed = storage_of(request.path, options)
    result = factorize_as(options, weight, request.rank, kind, scaling=request.scaling, seen=seen)
    A, B, base = result.A, result.B, _deployed(request, result.quantized, packed)
    stored = codec_for(base, request.path).read(base)
    if not torch.equal(stored, result.quantized.dequantize()):
        goal = weight if result.goal is None else result.goal
        A, B = _correction(request, options, seen, goal - stored)
    if changes is not None:
        changes.append(delta(A, B, request.scaling).add_(stored).sub_(weight))
    residual = torch.sub(weight, stored, out=stored)
    report = _measured(
        request,
        base,
        weight,
        residual,
        (A, B),
        seen,
        result.goal,
        zero_output_error=result.zero_output_error,
        quant_type=result.quantized.quant_type,
        steps=len(result.history),
        zero_error=result.zero_error,
        seconds=time.monotonic() - began,
    )
    return Start(A, B, base, report)


def _correction(request: Request, options: LoftQConfig, seen: Seen | None, left: Tensor) -> tuple[Tensor, Tensor]:
    """A and B for ``left`` (out, in), closest to it under what the options' method minimizes."""
    kind = needs_of(options.chosen_method).statistics
    metric = Metric()
    if seen is not None and kind is not None:
        diagonal = kind == "diagonal"
        damping = damping_for(options.damping, seen.statistics, seen.cross, seen.half, seen.factors)
        find = partial(Metric.of, seen.statistics, diagonal=diagonal, damping=damping)
        metric = made(seen.factors, (seen.statistics,), ("metric", diagonal, damping), find)
    return correction(left, request.rank, request.scaling, metric=metric, seed=options.seed)


def _measured(
    request: Request,
    base: nn.Module,
    weight: Tensor,
    residual: Tensor,
    factors: tuple[Tensor, Tensor],
    seen: Seen | None,
    goal: Tensor | None = None,
    **known: Any,
) -> LayerReport:
    """The errors of what is stored; of outputs, by what is left of the ``goal``, which is W if None, to its own.

    ``residual``, which is W - Q, is used up."""
    size = norm(weight) or 1.0
    quantization_error = norm(residual) / size
    A, B = factors
    error = norm(residual.addmm_(B, A, alpha=-request.scaling)) / size
    if seen is not None:
        goal = weight if goal is None else goal
        if goal is not weight:
            residual.add_(goal).sub_(weight)
        known["output_error"] = output_norm(residual, seen.statistics) / (output_norm(goal, seen.statistics) or 1.0)
        known["tokens"] = seen.tokens
        if seen.statistics.dim() == 2:
            known["in_features"] = weight.shape[1]
    return LayerReport(
        path=request.path,
        bits=8 * codec_for(base).nbytes(base) / weight.numel(),
        rank=request.rank,
        quantization_error=quantization_error,
        error=error,
        **{"zero_error": quantization_error, **known},
    )


def _deployed(request: Request, quantized: Quantized, packed: bool) -> nn.Module:
    """The module that holds ``quantized`` in the base's place."""
    base = request.base
    if request.family == "linear":
        return linear_holding(base, quantized, packed=packed)
    # A copy with a weight of its own; the memo keeps the old weight from being copied on the way.
    weight: Tensor = base.weight  # type: ignore[assignment]
    fresh = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
    simulated = copy.deepcopy(base, {id(weight): fresh})
    request.codec.write_(simulated, quantized.dequantize())
    return simulated


def _residual_start(request: Request, options: LoftQConfig, seen: Seen | None) -> Start:
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
    # Towards W, in whatever way the method looks at the inputs: those of the 16-bit model, which could say better
    # where the layers before were wrong, aren't known here.
    A, B = _correction(request, options, seen, residual)
    known = dict[str, Any]()
    if seen is not None:
        size = output_norm(full, seen.statistics) or 1.0
        known["zero_output_error"] = output_norm(residual, seen.statistics) / size
    seconds = time.monotonic() - began
    kind = getattr(request.base.weight, "quant_type", None) or getattr(request.base, "quant_type", request.codec.name)
    known.update(quant_type=kind, steps=1, seconds=seconds)
    report = _measured(request, request.base, full, residual, (A, B), seen, **known)
    return Start(A, B, report=report)
