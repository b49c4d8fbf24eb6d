"""Whether all processes have the same model with adapters, asked before an engine takes them for one.

Engines assume it, and find out late or never: other adapters on one process end in a collective that nobody answers;
another ``lora_alpha``, which no tensor shows, trains each process on another function; and weights that were drawn
without a seed are cut into pieces of different models. So each process tells the others what it has: names, shapes and
dtypes, what adapters are scaled by, and of each tensor that doesn't train a few elements.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..codecs import registered_codec
from ..codecs.shards.tensors import is_sharded
from ..errors import AdapterError
from ..model import LoraModel

#: Elements of a tensor that are compared. Weights that differ do so all over.
_SAMPLE = 64


def check_same(lora: LoraModel) -> list[str]:
    """Check that the model is one in all processes of the default group, each of which calls this.

    Returns:
        Names of the parameters, neither trained nor in codes, of which processes have different values.

    Raises:
        AdapterError: on every process, if they have other adapters or parameters, or other codes of one weight.
    """
    codes = set(stored_in_codes(lora))
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, ({**_layers(lora), **_parameters(lora)}, _values(lora, codes)))
    (first, values), own = told[0], dist.get_rank()
    for rank, (other, _) in enumerate(told):
        names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if names:
            raise AdapterError(
                f"{names[0]}: expected the same model with adapters in every process, found "
                f"{first.get(names[0], 'none')} in process 0 and {other.get(names[0], 'none')} in process {rank} "
                f"({len(names)} differences; this is process {own}); load and adapt it by the same lines in each"
            )
    differing = {name: r for r, (_, other) in enumerate(told) for name in other if other[name] != values.get(name)}
    for name, rank in differing.items():
        if name in codes:
            raise AdapterError(
                f"{name}: expected the same codes in every process, found others in processes 0 and {rank} (this is "
                f"process {own}); call torch.manual_seed with one seed before the model is made, quantized and adapted"
            )
    return list(differing)


def _layers(lora: LoraModel) -> dict[str, str]:
    """What layers compute with that is no tensor, by path."""
    found = {}
    for path, layer in lora.adapter_layers().items():
        rates = {name: getattr(dropout, "p", 0.0) for name, dropout in layer.lora_dropout.items()}
        found[path] = f"adapters scaled by {layer.scaling} with dropout {rates}, active {layer.active_adapters}"
    return found


def _parameters(lora: LoraModel) -> dict[str, str]:
    found = {}
    for name, parameter in lora.named_parameters():
        marks = f"{' that trains' if parameter.requires_grad else ''}{' on meta' if parameter.is_meta else ''}"
        found[name] = f"{tuple(parameter.shape)} of {parameter.dtype}{marks}"
    return found


def _values(lora: LoraModel, codes: Collection[str]) -> dict[str, str]:
    """A digest of some elements of each tensor that doesn't train."""
    held: dict[str, Tensor] = {name: p for name, p in lora.named_parameters() if not p.requires_grad}
    held |= {name: buffer for name, buffer in lora.named_buffers() if name in codes}
    return {name: _digest(tensor) for name, tensor in held.items() if not (tensor.is_meta or is_sharded(tensor))}


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)][:_SAMPLE].cpu().contiguous()
    return hashlib.sha256(some.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def stored_in_codes(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that keep weights in few bits; biases aren't among them."""
    names = []
    for path, module in model.named_modules():
        codec = registered_codec(module)
        if codec is not None and codec.quantizer(module) is not None:
            held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            names += [f"{path}.{name}" for name, _ in held if name != "bias"]
    return names
