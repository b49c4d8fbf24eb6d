"""Which configuration describes how a model is stored, and the model's config made to say so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..codecs.packed import PackedLinear
from ..naming import Tree, base_of
from .config import PackedConfig, Stored
from .stock import BITSANDBYTES_TYPES, bitsandbytes_config, built_by_rule, skipped_modules
from .tensor_parallel import refuse_saving_


def storage_config(model: nn.Module, stored: Mapping[str, Stored], compute_dtype: torch.dtype) -> Any:
    """The configuration by which transformers loads ``model`` as it is stored.

    bitsandbytes' own where its rule builds exactly these modules, since every reader knows it; else ours.

    Args:
        model: of transformers; may be on the meta device, and dense.
        stored: how each quantized linear is stored, by path, at all paths where it stands.
        compute_dtype: of bitsandbytes' products, for its own configuration.
    """
    kinds = {replace(kind, blocksize=None) for kind in stored.values()}  # 4-bit weights tell their own blocksize
    if len(kinds) == 1 and (kind := next(iter(kinds))).bitsandbytes:
        config = bitsandbytes_config(
            kind.quant_type,
            compute_dtype,
            skipped_modules(model, set(stored)),
            double_quant=kind.double_quant,
            threshold=kind.threshold,
        )
        if not hasattr(model, "_from_config") or built_by_rule(model, config) == set(_once(model, stored)):
            return config
    return PackedConfig.of_stored(stored)


def record_quantization_(model: Any) -> None:
    """Make ``model.config`` say how the model's linears are stored, so that ``model.save_pretrained(folder)``
    writes what ``from_pretrained(folder)`` loads.

    LoftQ starts, ``quantize_`` and merges into few bits call it; adapters on the model make no difference.
    """
    bases: dict[str, Any] = {path: base_of(module) for path, module in Tree(model).modules.items()}
    modules = {path: m for path, m in bases.items() if isinstance(m, PackedLinear) or _is_bitsandbytes(m)}
    if not modules:
        return
    dtypes = [module.compute_dtype for module in modules.values() if getattr(module, "compute_dtype", None) is not None]
    stored = {path: Stored.of(module) for path, module in modules.items()}
    refuse_saving_(model, modules.values())
    model.config.quantization_config = storage_config(model, stored, dtypes[0] if dtypes else torch.float32)


def _is_bitsandbytes(module: Any) -> bool:
    return type(module).__name__ in BITSANDBYTES_TYPES


def _once(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Of ``paths`` the first of each module."""
    tree = Tree(model)
    return [path for path in paths if tree.first(path) == path]
