"""The config.json of a merged model: the base's, with what the merge has changed of dtype, storage and ties."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch

from ...checkpoints.stored_model import StoredModel
from ...codecs.quantized import Quantizer
from ...errors import MergeError
from ...merging.task import MergeTask
from ...training.preparation.quantize import in_bitsandbytes


def settings_of(
    base: StoredModel,
    task: MergeTask,
    quantized: Mapping[str, Quantizer],
    packed: Container[str] = (),
    *,
    untied: bool,
) -> dict[str, Any]:
    """What goes into config.json.

    Args:
        quantized: how each quantized module of the output is stored, by path.
        packed: paths of those that are packed by us whatever the type.
        untied: parameters that were tied no longer are.

    Raises:
        MergeError: a k-bit type is asked for, and no module is to be stored in it.
    """
    settings: dict[str, Any] = copy.deepcopy(base.settings)
    if untied:
        _set(settings, ("tie_word_embeddings",), False)
        settings["tie_word_embeddings"] = False
    if task.dtype is not None:
        settings.pop("quantization_config", None)
        name = str(task.dtype).removeprefix("torch.")
        _set(settings, ("dtype", "torch_dtype"), name)
        settings["dtype"] = settings.pop("torch_dtype", name)
    elif task.into != "same":
        if not quantized:
            raise MergeError(
                f"into={task.into!r}: expected at least one adapted linear layer to quantize, found none; merge into "
                "'bfloat16'"
            )
        settings["quantization_config"] = _quantization_config(base, quantized, packed)
    return settings


def _quantization_config(
    base: StoredModel, quantized: Mapping[str, Quantizer], packed: Container[str]
) -> dict[str, Any]:
    from ...hf_quantizer import Stored, storage_config

    before = base.settings.get("quantization_config") or {}
    threshold = before.get("llm_int8_threshold", 0.0) if before.get("load_in_8bit") else 0.0
    stored: dict[str, Stored] = {}
    for path, kind in quantized.items():
        by_bitsandbytes = path not in packed and in_bitsandbytes(kind.quant_type, kind.blocksize)
        outliers = threshold if kind.quant_type == "int8" else 0.0
        own = Stored(kind.quant_type, kind.blocksize, kind.double_quant, by_bitsandbytes, outliers)
        stored |= dict.fromkeys(_everywhere(base, [path]), own)
    return dict(storage_config(base.model, stored, _compute_dtype(base.settings)).to_dict())


def _everywhere(base: StoredModel, paths: Iterable[str]) -> list[str]:
    """``paths``, and where the same modules stand again."""
    chosen = list(paths)
    return chosen + [path for path, first in base.names.first.items() if path != first and first in set(chosen)]


def _compute_dtype(settings: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, str(settings.get("dtype") or settings.get("torch_dtype") or "float32"))


def _set(settings: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    """Give every entry called one of ``keys`` that isn't null this value, in parts of the model too."""
    for key, found in settings.items():
        if key in keys and found is not None:
            settings[key] = value
        elif isinstance(found, dict) and key != "quantization_config":
            _set(found, keys, value)
