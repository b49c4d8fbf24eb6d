"""``init_lora_weights="loftq"``: adapters that start where base + scaling * B @ A is closest to the full weight.

Two situations, told apart by how the base module keeps its weight:

- **Dense** (``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``): the alternation quantizes the weight
  and a module that holds the result takes the base's place. For 4 bits that is bitsandbytes' ``Linear4bit``, for
  8 its ``Linear8bitLt``. Types that no layer here stores in fewer bits (2 and 3 bits, uniform tables, and
  embeddings at any width) are simulated: a module of the same type and dtype whose values are the quantized
  ones, with the numerics of low bits and the memory of the original.
- **Already quantized**: the base stays as it is, and the 16-bit weights of the same model are read lazily, a
  tensor at a time, from ``LoftQConfig.weights``. With Q fixed there is nothing to alternate: one decomposition
  of W - Q is the optimum.

The correction is always of what the new base really reads as: where storing rounds once more (a simulated
weight in bfloat16, say), the factors are fitted again to what is left.
"""

from __future__ import annotations

import copy
import os
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.config import LoftQConfig
from qlora_kit.errors import ConfigError, StorageError, TargetError, closest
from qlora_kit.initializers import Request, Start, register_initializer
from qlora_kit.shards import ShardReader

from .alternate import correction, factorize
from .quantizers import DEFAULT_TYPES, Quantized

# Codecs of modules whose weight is not quantized yet.
DENSE = ("dense", "conv1d", "embedding")
# What bitsandbytes' kernels take.
BNB_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


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
            return _quantized_start(request, options)
        return _residual_start(request, options)
    except ConfigError as error:
        raise ConfigError(f"{request.path}: {error}") from error


def _quantized_start(request: Request, options: LoftQConfig) -> Start:
    """Alternate on a dense weight; the start brings the quantized base."""
    kind = options.quant_type or DEFAULT_TYPES[options.loftq_bits]
    if kind in ("nf4", "fp4") and request.family == "linear" and options.blocksize not in BNB_BLOCKSIZES:
        raise ConfigError(
            f"loftq_config.blocksize: expected one of {list(BNB_BLOCKSIZES)} for {kind}, which is what bitsandbytes "
            f"stores, found {options.blocksize}; pass blocksize=64"
        )
    weight = request.codec.read(request.base)
    result = factorize(
        weight,
        request.rank,
        quant_type=kind,
        steps=options.loftq_iter,
        scaling=request.scaling,
        blocksize=options.blocksize,
        double_quant=options.double_quant,
    )
    base = _deployed(request, result.quantized)
    stored = codec_for(base, request.path).read(base)
    if torch.equal(stored, result.quantized.dequantize()):
        return Start(result.A, result.B, base)
    return Start(*correction(weight - stored, request.rank, request.scaling), base)


def _deployed(request: Request, quantized: Quantized) -> nn.Module:
    """The module that holds ``quantized`` in the base's place."""
    base, kind = request.base, quantized.quant_type
    if request.family == "linear" and kind in ("nf4", "fp4", "int8"):
        from qlora_kit.codecs.bnb import quantize_linear, quantize_linear_int8

        linear = _as_linear(request)
        if kind == "int8":
            return quantize_linear_int8(linear, quantized.source)
        return quantize_linear(
            linear,
            quantized.source,
            quant_type=kind,
            blocksize=quantized.blocksize or 0,
            double_quant=quantized.double_quant,
        )
    # A copy with a weight of its own; the memo keeps the old weight from being copied on the way.
    weight: Tensor = base.weight  # type: ignore[assignment]
    fresh = nn.Parameter(torch.empty_like(weight), requires_grad=weight.requires_grad)
    simulated = copy.deepcopy(base, {id(weight): fresh})
    request.codec.write_(simulated, quantized.dequantize())
    return simulated


def _as_linear(request: Request) -> nn.Linear:
    """The base, or an ``nn.Linear`` of the same function over the same storage (transformers' ``Conv1D``)."""
    if isinstance(request.base, nn.Linear):
        return request.base
    out_features, in_features = request.shape
    bias: nn.Parameter | None = request.base.bias  # type: ignore[assignment]
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(request.base.weight.t(), requires_grad=False)  # type: ignore[operator]
    linear.bias = bias  # type: ignore[assignment]
    return linear.train(request.base.training)


def _residual_start(request: Request, options: LoftQConfig) -> Start:
    """One decomposition of W - Q; the base stays."""
    if options.weights is None:
        raise ConfigError(
            f"loftq_config.weights: expected the folder with the 16-bit safetensors of this model, since the module "
            f"is already quantized ({request.codec.name}), found None; pass LoftQConfig(weights=folder), or load "
            "the model in 16 bits and let the start quantize it"
        )
    stored = request.codec.read(request.base)
    full = original_weight(options.weights, request.path, stored)
    return Start(*correction(full - stored, request.rank, request.scaling))


def original_weight(folder: str | os.PathLike[str], path: str, stored: Tensor) -> Tensor:
    """The weight that ``stored`` (float32 (out, in)) was quantized from: float32 (out, in) on its device.

    The name is ``<path>.weight``, in a checkpoint of the whole model or of the model without or inside its
    head. A matrix that was stored transposed (transformers' Conv1D) is told by its shape, a square one by
    which orientation is closer.

    Raises:
        StorageError: no tensor of the names tried, one of another shape, or one that is farther from
            ``stored`` than a zero matrix is.
    """
    reader = _reader(Path(folder))
    name = _name_in(reader, path)
    full = reader.tensor(name).to(stored.device, torch.float32)
    candidates = [matrix for matrix in (full, full.mT) if matrix.shape == stored.shape] if full.dim() == 2 else []
    if not candidates:
        raise StorageError(
            f"{path}: expected a weight of shape {tuple(stored.shape)} in {folder}, found {name!r} of shape "
            f"{tuple(full.shape)}; pass the folder of the model that was quantized"
        )
    closer = min(candidates, key=lambda matrix: float((matrix - stored).norm()))
    distance, size = float((closer - stored).norm()), float(closer.norm())
    if distance > size:
        raise StorageError(
            f"{path}: expected {name!r} in {folder} to be the weight that the module was quantized from, found one "
            f"at a relative distance of {distance / (size or 1.0):.2f}; pass the folder of the same model"
        )
    return closer.contiguous()


def _name_in(reader: ShardReader, path: str) -> str:
    whole = f"{path}.weight"
    tried = [whole, f"model.{whole}", whole.partition(".")[2] if "." in path else whole]
    for name in tried:
        if name in reader:
            return name
    nested = [name for name in reader if name.endswith(f".{whole}")]
    if len(nested) == 1:
        return nested[0]
    raise StorageError(
        f"{path}: expected its 16-bit weight in {reader.folder}, found none of the names tried "
        f"({', '.join(dict.fromkeys(tried))}, and one that ends in .{whole}, of which there are {len(nested)}); "
        f"the closest are {closest(whole, reader)}; pass the folder of the same model"
    )


def _reader(folder: Path) -> ShardReader:
    # The index is read once for all modules of a model, and again when the folder has changed.
    return _reader_of(folder, folder.stat().st_mtime_ns if folder.is_dir() else 0)


@lru_cache(maxsize=1)
def _reader_of(folder: Path, changed: int) -> ShardReader:
    return ShardReader(folder)
