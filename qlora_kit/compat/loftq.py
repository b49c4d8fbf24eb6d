"""PEFT's ``replace_lora_weights_loftq``: correct the adapters of a model that is quantized already."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter_files.backbone import fingerprint
from ..checkpoints.originals import original_weight
from ..codecs import codec_for
from ..errors import AdapterError, StorageError
from ..layers import AdapterLayer
from ..lowrank import factor_pair, truncated_svd
from ..model.lora_model import LoraModel


def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | os.PathLike[str] | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Overwrite an adapter's factors by the best correction of W - Q, layer by layer, W read lazily.

    PEFT's function takes 4-bit linears only; this one every quantized layer with an adapter, and it counts the
    adapter's scaling, which PEFT's doesn't.

    Args:
        peft_model: a ``PeftModel`` or ``LoraModel`` on a quantized base, nothing merged.
        model_path: the 16-bit safetensors of the same model: a folder, one file of it, or its index; None looks for
            the base model in the local Hub cache.
        adapter_name: the adapter to overwrite.
        callback: called with (model, path) after each layer; where it returns False, that layer's factors are
            put back. Without it all are kept.

    Raises:
        AdapterError: not a model with that adapter, or no quantized layer has it, or something is merged.
        StorageError: the 16-bit weights are missing or belong to another model; layers done before are kept.
    """
    if not isinstance(peft_model, LoraModel) or adapter_name not in peft_model.peft_config:
        names = sorted(getattr(peft_model, "peft_config", {}))
        raise AdapterError(
            f"replace_lora_weights_loftq: expected a model with adapter {adapter_name!r}, found "
            f"{type(peft_model).__name__} with {names}; wrap the model with get_peft_model first"
        )
    layers = {path: layer for path, layer in peft_model.adapter_layers().items() if adapter_name in layer.r}
    quantized = {path: layer for path, layer in layers.items() if not _is_dense(layer)}
    if not quantized:
        raise AdapterError(
            f"replace_lora_weights_loftq: expected quantized layers with adapter {adapter_name!r}, found "
            f"{len(layers)} layers, all dense; load the base quantized, or start with init_lora_weights='loftq'"
        )
    if merged := [path for path, layer in layers.items() if layer.merged_adapters]:
        raise AdapterError(f"{merged[0]}: expected nothing merged, found {layers[merged[0]].merged_adapters}; unmerge")
    folder = _folder(peft_model, adapter_name) if model_path is None else _there(model_path)
    for path, layer in quantized.items():
        stored = layer.codec.read(layer.base_layer)
        residual = original_weight(folder, path, stored) - stored
        before = tuple(factor.detach().clone() for factor in layer.factors(adapter_name))
        triplets = truncated_svd(residual, min(layer.r[adapter_name], *residual.shape))
        A, B = factor_pair(*triplets, layer.scaling[adapter_name])
        if (rest := layer.r[adapter_name] - A.shape[0]) > 0:  # a branch wider than its weight goes on as it began
            A, B = torch.cat([A, before[0][-rest:].to(A)]), torch.cat([B, B.new_zeros(B.shape[0], rest)], dim=1)
        layer.set_factors_(adapter_name, A, B)
        if callback is not None and not callback(peft_model, path):
            layer.set_factors_(adapter_name, *before)
    peft_model.backbones[adapter_name] = fingerprint({path: layer.base_layer for path, layer in layers.items()})


def _is_dense(layer: AdapterLayer) -> bool:
    return codec_for(layer.base_layer).stored(layer.base_layer)[0].is_floating_point()


def _there(model_path: str | os.PathLike[str]) -> Path:
    """As given; the folder for a file that isn't in it, as "model.safetensors" isn't where there are shards."""
    path = Path(model_path)
    return path.parent if not path.exists() and path.suffix == ".safetensors" else path


def _folder(model: LoraModel, adapter_name: str) -> str:
    """The base model's folder, on this disk or in the Hub's cache; nothing is downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    config = model.peft_config[adapter_name]
    name = config.base_model_name_or_path
    if name and os.path.isdir(name):
        return name
    try:
        if name:
            return snapshot_download(name, revision=config.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    raise StorageError(
        f"replace_lora_weights_loftq: expected the 16-bit weights of {name!r} on this disk, found none; "
        "pass model_path=folder"
    )
