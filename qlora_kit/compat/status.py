"""What state a model's adapters are in, layer by layer and as a whole: PEFT's two status records.

A value that differs between layers where it should be one and the same is reported as "irregular".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from ..codecs import Codec
from ..errors import AdapterError
from ..layers import AdapterLayer, ModulesToSave
from ..model.lora_model import LoraModel
from .layer_kinds import name_of

Irregular = Literal["irregular"]

# PEFT's names for storage that it knows too; other codecs go by their own.
_BACKENDS = {"bnb-4bit": "bnb 4bit", "bnb-int8": "bnb 8bit"}


@dataclass
class TunerLayerStatus:
    """One adapter layer, or one module with trained copies (which has no merged adapters)."""

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole model; ``trainable_params`` and ``total_params`` count as ``get_nb_trainable_parameters``."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of each adapter layer of a wrapped model, or of a bare one with layers injected.

    Raises:
        AdapterError: the model has no adapter layer.
    """
    layers = [
        (name.removeprefix("base_model."), m)  # PEFT looks into what its wrapper holds
        for name, m in model.named_modules()
        if isinstance(m, (AdapterLayer, ModulesToSave))
    ]
    if not layers:
        raise AdapterError(
            f"expected a model with adapters, found a {type(model).__name__} without; apply get_peft_model or "
            "inject_adapter_in_model first"
        )
    return [_layer_status(name, module) for name, module in layers]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a wrapped model, or of a bare one with layers injected.

    Raises:
        AdapterError: the model has no adapter layer.
    """
    layers = get_layer_status(model)
    wrapper = cast("LoraModel", model) if issubclass(type(model), LoraModel) else None
    trainable, total = LoraModel.get_nb_trainable_parameters(model)
    available = sorted({name for layer in layers for name in layer.available_adapters})
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    merged_everywhere = all(set(merged) & set(s.available_adapters) <= set(s.merged_adapters) for s in layers)
    return TunerModelStatus(
        base_model_type=_base_type(model, wrapper),
        adapter_model_type="None" if wrapper is None else "LoraModel",
        peft_types={} if wrapper is None else {name: _plain(c.peft_type) for name, c in wrapper.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=merged if merged_everywhere else "irregular",
        requires_grad={
            name: _common(layer.requires_grad[name] for layer in layers if name in layer.requires_grad)
            for name in available
        },
        available_adapters=available,
        devices={
            name: sorted({device for layer in layers for device in layer.devices.get(name, ())}) for name in available
        },
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def _plain(kind: str) -> str:
    return str(getattr(kind, "value", kind))


def _base_type(model: nn.Module, wrapper: LoraModel | None) -> str:
    if wrapper is not None:
        return type(wrapper.model).__name__
    transformers = sys.modules.get("transformers")
    known = transformers is not None and isinstance(model, transformers.PreTrainedModel)
    return type(model).__name__ if known else "other"


def _layer_status(name: str, module: AdapterLayer | ModulesToSave) -> TunerLayerStatus:
    tensors: dict[str, list[Tensor]] = {
        adapter: list(module.adapter_tensors(adapter).values()) for adapter in module.adapter_names()
    }
    adapted = isinstance(module, AdapterLayer)
    return TunerLayerStatus(
        name=name,
        module_type=name_of(module),
        enabled=not module.disable_adapters,
        active_adapters=list(module.active_adapters),
        merged_adapters=list(module.merged_adapters) if adapted else [],
        requires_grad={
            adapter: _common(t.requires_grad for t in values if isinstance(t, nn.Parameter))
            for adapter, values in tensors.items()
        },
        available_adapters=sorted(tensors),
        devices={adapter: sorted({t.device.type for t in values}) for adapter, values in tensors.items()},
        quantization_backend=_backend(module.codec) if adapted else None,
    )


def _backend(codec: Codec) -> str | None:
    """The library and format of a quantized weight; None where the codec leaves dense modules as they are."""
    dense = type(codec).dense_like is Codec.dense_like
    return None if dense else _BACKENDS.get(codec.name, codec.name)


def _common(values: Iterable[Any]) -> Any:
    """The one value that all have, or "irregular"."""
    values = list(values)
    return values[0] if all(value == values[0] for value in values) else "irregular"
