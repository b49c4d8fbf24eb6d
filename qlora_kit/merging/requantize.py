"""From an ideal weight back to few bits: to the nearest codes, or by a rounding that looks further, and with a
low-rank branch for what is lost. Those ways are LoftQ's, so this is where merging asks for the ``loftq`` package.

- "nearest": each value to its nearest code. A delta smaller than half a step is gone.
- "scale-search": blocks' scales that leave the least squared error, then nearest codes.
- "error-feedback": searched scales, and codes that make up for one another under the inputs' second moments (GPTQ);
  or, for a small delta on a base that is stored so already, its own codes changed until the delta arrives.
- a residual rank k: Q and the branch s B A found together, as LoftQ starts an adapter (``loftq.factorize``), by the
  method that goes with the rounding. The branch stays attached: the weight has few bits and the delta isn't lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.finite import all_finite
from ..codecs.quantized import Quantized, Quantizer
from ..errors import MergeError
from ..naming import module_at
from .agreement import Batches

WAYS = ("nearest", "scale-search", "error-feedback")
_ON_DEMAND = "loftq.for_merging"


@dataclass(frozen=True)
class Grid:
    """Where an ideal weight comes from, if its base lies on the grid of the quantizer that it is to be rounded by.

    Attributes:
        stored: the base, as it is stored.
        A, B: float32 (rank, in) and (out, rank): the ideal weight is what ``stored`` reads as, plus B @ A.
    """

    stored: Quantized
    A: Tensor
    B: Tensor


@dataclass(frozen=True)
class Rounded:
    """A quantized weight, and A (rank, in) and B (out, rank) with ``quantized + B @ A`` close to the ideal one."""

    quantized: Quantized
    residual: tuple[Tensor, Tensor] | None = None


@torch.no_grad()
def rounded(
    ideal: Tensor,
    quantizer: Quantizer,
    way: str = "nearest",
    moments: Tensor | None = None,
    residual_rank: int = 0,
    grid: Grid | None = None,
) -> Rounded:
    """Quantize float32 (out, in) ``ideal``.

    Args:
        way: one of ``WAYS``.
        moments: second moments (in, in) of the layer's inputs, or their diagonal (in,); "error-feedback" needs them
            whole, the others weigh errors by them where they are given.
        residual_rank: of the branch; cut to what the weight has.
        grid: a small delta on codes that are there already needn't be rounded anew; see ``loftq.for_merging``.
    """
    if way == "nearest" and not residual_rank:
        return Rounded(quantizer(ideal))
    return _loftq().round_merged(ideal, quantizer, way, moments, residual_rank, grid)


def batches_of(text: Any, model: nn.Module) -> Batches:
    """``text`` ("builtin" or None, a text file, token ids (rows, tokens), or batches) as what ``model`` is called with.

    Raises:
        ConfigError, StorageError: there is no such text, or no tokenizer beside the model.
    """
    return _loftq().text_batches(text, model)


def moments_of(statistics: Any, model: nn.Module, paths: list[str], way: str) -> Mapping[str, Tensor]:
    """Second moments of the inputs of the modules at ``paths``, by path.

    Args:
        statistics: these themselves, by path; or a text to collect them on, see ``batches_of``. None is none, except
            for "error-feedback", which takes the text that every Python has.

    Raises:
        MergeError: they lack a module that needs them, are of another shape, or can be none.
    """
    if statistics is None and way != "error-feedback":
        return {}
    given = isinstance(statistics, Mapping)
    found: Mapping[str, Tensor] = statistics if given else _loftq().text_moments(statistics, model, paths)
    missing = [path for path in paths if path not in found]
    if missing and way == "error-feedback":
        raise MergeError(
            f"{missing[0]}: expected second moments of its inputs for rounding='error-feedback', found none "
            f"({len(missing)} of {len(paths)} modules); pass statistics of all of them, text that reaches them, or "
            "another rounding"
        )
    if not given:
        return found
    return {path: _checked(path, found[path], module_at(model, path), way) for path in paths if path in found}


def _checked(path: str, moments: Any, layer: Any, way: str) -> Tensor:
    """``moments`` in float32 on the layer's device, once they are known to be of its inputs' shape and finite."""
    width = layer.codec.shape(layer.base_layer)[1]
    shapes = [(width, width)] if way == "error-feedback" else [(width, width), (width,)]
    if not isinstance(moments, Tensor) or tuple(moments.shape) not in shapes:
        raise MergeError(
            f"{path}: expected second moments of its inputs of shape {' or '.join(map(str, shapes))} for "
            f"rounding={way!r}, found {tuple(moments.shape) if isinstance(moments, Tensor) else moments!r}; pass those "
            "of this model's layers, or a text to collect them on"
        )
    found = moments.detach().to(layer.codec.device(layer.base_layer), torch.float32)
    if not all_finite(found) or ((found if found.dim() == 1 else found.diagonal()) < 0).any():
        raise MergeError(
            f"{path}: expected second moments of its inputs that are finite in float32, mean squares of at least 0, "
            "found NaN, infinity or a negative one; collect them in float32 or better"
        )
    return found


def target_of(
    own: Quantizer | None, quant_type: str, blocksize: int | str | None, double_quant: bool | None
) -> Quantizer:
    """How a module is to be stored as ``quant_type``: as it is, where it is of that type, but for what is given."""
    if own is None or own.quant_type != quant_type:
        own = Quantizer(quant_type, None if quant_type == "int8" else 64)
    if quant_type == "int8":
        return own
    if blocksize is not None:
        own = replace(own, blocksize=None if blocksize == "row" else int(blocksize))
    return own if double_quant is None else replace(own, double_quant=double_quant)


def _loftq() -> Any:
    return import_module(_ON_DEMAND)
