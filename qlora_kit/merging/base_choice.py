"""Which weights a delta is added to: those that the adapter was trained on, dequantized, or the original 16-bit ones.

The adapter saw the dequantized base, errors and all, and may have made up for some of them; the original is the
better model without it. Neither is better always, so both are measured: the model as it is, and with W - Q added to
the output of every quantized module, a module at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints.originals import original_weight
from ..codecs import Codec, find_codec
from ..codecs.quantized import Quantizer
from ..naming import Tree, base_of
from .agreement import Batches, mean_loss
from .requantize import Grid


def quantized_modules(model: nn.Module | Tree) -> dict[str, nn.Module]:
    """Every module of ``model`` that holds a quantized weight, under adapters too, by its first path without them."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for path, module in Tree.of(model).modules.items():
        base = base_of(module)
        codec = find_codec(base)
        if codec is not None and codec.quantizer(base) is not None:
            found.setdefault(id(base), (path, base))
    return dict(found.values())


def base_losses(model: nn.Module, folder: Path, batches: Batches) -> dict[str, float]:
    """The mean next-token loss of ``model``, adapters inside, with either base.

    Args:
        folder: of the original weights.

    Raises:
        MergeError: not a causal language model.
        StorageError: an original weight is missing, or of another model.
    """
    losses = {"dequantized": mean_loss(model, batches)}
    with _corrected(quantized_modules(model), folder):
        losses["original"] = mean_loss(model, batches)
    return losses


@contextmanager
def _corrected(modules: Mapping[str, nn.Module], folder: Path) -> Iterator[None]:
    """In the block each module computes with its original weight."""
    with ExitStack() as stack:
        for path, module in modules.items():

            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor, path: str = path) -> Tensor:
                codec: Any = find_codec(module)
                stored = codec.read(module)
                difference = original_weight(folder, path, stored) - stored
                x: Tensor = args[0]
                return output + F.linear(x.to(difference.dtype), difference).to(output.dtype)

            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


def base_weight(path: str, codec: Codec, base: nn.Module, original: Path | None) -> tuple[Tensor, float | None]:
    """What a delta is added to, float32 (out, in): what ``base`` stores, or where that is quantized and ``original``
    is given the weight in that folder, with how far the stored one is from it."""
    stored = codec.read(base)
    if original is None or codec.quantizer(base) is None:
        return stored, None
    return _original_of(original, path, stored)


def grid_of(
    codec: Codec, base: nn.Module, target: Quantizer | None, delta: tuple[Tensor, Tensor] | None, original: Path | None
) -> Grid | None:
    """The stored codes that ``delta`` may be brought into by changing some of them: where the base is stored as
    ``target`` says already, and its own weight is what the delta is added to."""
    if delta is None or original is not None or target is None or target != codec.quantizer(base):
        return None
    stored = codec.quantized(base)
    return None if stored is None else Grid(stored, *delta)


@torch.no_grad()
def _original_of(folder: Path, path: str, stored: Tensor) -> tuple[Tensor, float]:
    """The original weight, float32 (out, in), and how far ``stored``, which is overwritten, is from it."""
    weight = original_weight(folder, path, stored)
    return weight, float(torch.linalg.vector_norm(stored.sub_(weight)))
