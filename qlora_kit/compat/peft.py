"""PEFT's names over this toolkit: a script written for PEFT's LoRA runs after changing its import line.

    from qlora_kit.compat.peft import LoraConfig, get_peft_model

These are the toolkit's own objects and paths under other names, never copies of them: a ``PeftModel`` is a
``LoraModel``, a ``LoraLayer`` an ``AdapterLayer``, and files are the same. Where PEFT is silent about a mistake
(a target that matches nothing, a key that fits nowhere) this toolkit's errors stay errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_files import tensors as storage
from ..adapter_files.folder import PREFIX
from ..config.lora import LoftQConfig
from ..config.lora import LoraConfig as CoreLoraConfig
from ..errors import AdapterError
from ..layers import AdapterLayer as LoraLayer
from ..model.lora_model import LoraModel
from ..preparation.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from .auto import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from .configs import LoraConfig, PeftConfig, PeftType, TaskType, get_peft_config
from .hub import adapter_folder
from .loftq import replace_lora_weights_loftq
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    no_leftover_keys,
    peft_class_for,
)

__all__ = [
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "LoftQConfig",
    "LoraConfig",
    "LoraLayer",
    "LoraModel",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]

# The attribute by which a bare model remembers the LoraModel that manages the layers in it.
_MANAGER = "_lora_model"


def get_peft_model(
    model: nn.Module,
    peft_config: CoreLoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """``model`` with a new adapter injected in place, wrapped in the class of ``peft_config.task_type``.

    Args:
        mixed: return a ``PeftMixedModel``.
        autocast_adapter_dtype, low_cpu_mem_usage: see ``PeftModel``.
        revision: of the base model, recorded in the adapter's configuration.

    Raises:
        AdapterError: ``model`` is wrapped already.
    """
    if issubclass(type(model), LoraModel):
        raise AdapterError(
            f"expected a model that isn't wrapped yet, found a {type(model).__name__}; add another adapter with "
            "model.add_adapter(name, config), or start over from model.unload()"
        )
    kind = PeftMixedModel if mixed else peft_class_for(peft_config.task_type)
    peft_model = kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
    if revision is not None:
        peft_model.peft_config[adapter_name].revision = revision
    return peft_model


def inject_adapter_in_model(
    peft_config: CoreLoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """``model`` itself, adapter layers injected in place, the new adapter active and trainable; no wrapper.

    Called again with another name it adds another adapter. The state dict functions below take the result.
    """
    manager: LoraModel | None = vars(model).get(_MANAGER)
    if manager is None:
        manager = LoraModel(model, peft_config, adapter_name)
        # Into __dict__, past nn.Module: the manager holds the model and mustn't become a submodule of it.
        vars(model).update({_MANAGER: manager, "peft_config": manager.peft_config})
    else:
        manager.add_adapter(adapter_name, peft_config)
        manager.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    return model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | str = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter under the keys of an adapter file, as copies on the CPU.

    Args:
        model: wrapped, or bare with layers injected (then the keys lack "base_model.model.").
        state_dict: take the values from this state dict of ``model``, gathered from shards say.
        unwrap_compiled: accepted for PEFT's sake; a compiled model is looked into anyway.
        save_embedding_layers: "auto", True or False; see ``LoraModel.save_pretrained``.

    Raises:
        AdapterError: no adapter of this name.
    """
    model = getattr(model, "_orig_mod", model)
    manager = _manager(model)
    state = storage.adapter_state(manager, adapter_name, state_dict, save_embedding_layers=save_embedding_layers)
    return state if manager is model else {key.removeprefix(PREFIX): value for key, value in state.items()}


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> Any:
    """Load what ``get_peft_model_state_dict`` gave, all or nothing; the adapter must be there already.

    With ``ignore_mismatched_sizes`` tensors of another shape than the model's are left out.

    Returns:
        torch's pair of missing and unexpected keys, always empty.

    Raises:
        StorageError: a key is missing, unexpected or mis-shaped; lists them.
    """
    manager = _manager(getattr(model, "_orig_mod", model))
    state = {key if key.startswith(PREFIX) else PREFIX + key: value for key, value in peft_model_state_dict.items()}
    if ignore_mismatched_sizes:
        current = storage.adapter_state(manager, adapter_name)
        for key in state.keys() & current.keys():
            if state[key].shape != current[key].shape:
                state[key] = current[key]
    storage.load_adapter_state_(manager, adapter_name, state)
    return no_leftover_keys()


def load_peft_weights(
    model_id: str | os.PathLike[str], device: str | torch.device | None = None, **kwargs: Any
) -> dict[str, Tensor]:
    """The tensors in an adapter's file, on ``device`` (default: the CPU)."""
    _, state = storage.read_adapter(adapter_folder(model_id, **kwargs))
    return {key: value.to(device or "cpu") for key, value in state.items()}


def _manager(model: nn.Module) -> LoraModel:
    """The ``LoraModel`` that ``model`` is, or the one that injected layers into it."""
    if issubclass(type(model), LoraModel):
        return model  # type: ignore[return-value]
    manager: LoraModel | None = vars(model).get(_MANAGER)
    if manager is None:
        raise AdapterError(
            f"expected a model from get_peft_model or inject_adapter_in_model, found a {type(model).__name__}; "
            "pass the wrapped model itself, not the model inside it"
        )
    return manager
