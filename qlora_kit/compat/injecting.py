"""From a bare model and a configuration to a model with adapters: wrapped, or with layers injected and no wrapper."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config.lora import LoraConfig
from ..errors import AdapterError, TargetError
from ..injection.adapted import Adapted
from ..injection.engine import make_plan
from ..layers import AdapterLayer
from ..model.loading import config_for_keys
from ..model.lora_model import LoraModel
from ..naming import unwrapped
from .errors import PeftWarning
from .lenient import without_idle_patterns
from .meta import to_meta_
from .model import PeftModel
from .tasks import PeftMixedModel

# The attribute by which a bare model remembers the LoraModel that manages the layers in it.
_MANAGER = "_lora_model"


def get_peft_model(
    model: nn.Module,
    peft_config: LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """``model`` with a new adapter injected in place, wrapped in the class of ``peft_config.task_type``.

    Warns where ``model`` is wrapped or has adapter layers already, as in a cell of a notebook that is run again: an
    adapter of this name then makes room for the new one, and others stay in the layers. Warns too where
    ``peft_config`` names another base model than this one, or another ``revision``.

    Args:
        mixed: return a ``PeftMixedModel``.
        autocast_adapter_dtype, low_cpu_mem_usage: see ``PeftModel``.
        revision: of the base model, recorded in the adapter's configuration.

    Raises:
        AdapterError: an adapter of this name is merged into the weights.
    """
    if issubclass(type(model), LoraModel) or any(isinstance(module, AdapterLayer) for module in model.modules()):
        _warn("this model has adapters already, and gets more of them; unload() it first to start over")
        model = _with_room_(model, peft_config, adapter_name)
    peft_config = _for_this_base(peft_config, model, revision)
    kind = PeftMixedModel if mixed else PeftModel.of_task(peft_config.task_type)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _with_room_(model: nn.Module, peft_config: LoraConfig, adapter_name: str) -> nn.Module:
    """The model itself, without an adapter of this name; as it was where ``peft_config`` doesn't fit it."""
    base: nn.Module = model.model if issubclass(type(model), LoraModel) else model  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said where they are added
        make_plan(base, without_idle_patterns(base, peft_config))
    adapted = Adapted(base)
    for part in adapted.parts():
        part.delete_adapter(adapter_name)
    adapted.drop_(empty=True)
    return base


def _for_this_base(peft_config: LoraConfig, model: nn.Module, revision: str | None) -> LoraConfig:
    """``peft_config`` with the name and the revision of ``model``."""
    changes: dict[str, Any] = {}
    name, found = peft_config.base_model_name_or_path, vars(model).get("name_or_path") or None
    if name is not None and found is not None and name != found:
        _warn(f"the configuration's base_model_name_or_path is {name!r}, and the model, which is recorded, {found!r}")
        changes["base_model_name_or_path"] = found
    if revision is not None:
        if peft_config.revision not in (None, revision):
            _warn(f"revision {peft_config.revision!r} of the configuration gives way to {revision!r}")
        changes["revision"] = revision
    return dataclasses.replace(peft_config, **changes) if changes else peft_config


def _warn(said: str) -> None:
    warnings.warn(f"get_peft_model: {said}", PeftWarning, stacklevel=3)


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """``model`` itself, adapter layers injected in place, the new adapter active and trainable; no wrapper.

    Called again with another name it adds another adapter. The functions of state dicts take the result.

    Args:
        low_cpu_mem_usage: leave the factors on the meta device, for ``set_peft_model_state_dict`` to fill.
        state_dict: an adapter's tensors; exactly the modules that their keys name get a branch, with a warning where
            ``peft_config`` selects others. The values aren't read.

    Raises:
        TargetError: a key names no module of ``model``.
    """
    peft_config = without_idle_patterns(unwrapped(model), peft_config)
    if state_dict is not None:
        peft_config = _checked_against(model, peft_config, config_for_keys(model, peft_config, state_dict))
    place = vars(unwrapped(model))
    manager: LoraModel | None = place.get(_MANAGER)
    if manager is None:
        manager = LoraModel(model, peft_config, adapter_name)
        # Into __dict__, past nn.Module: the manager holds the model and mustn't become a submodule of it.
        place.update({_MANAGER: manager, "peft_config": manager.peft_config})
    else:
        manager.add_adapter(adapter_name, peft_config)
        manager.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
    if low_cpu_mem_usage:
        to_meta_(manager, adapter_name)
    return model


def _checked_against(model: nn.Module, asked: LoraConfig, named: LoraConfig) -> LoraConfig:
    """``named``, the configuration of the modules that keys name; warns if ``asked`` selects others."""
    wanted = {entry.path for entry in make_plan(model, named).entries}
    try:
        selected = {entry.path for entry in make_plan(model, asked).entries}
    except TargetError:
        selected = set()
    if selected != wanted:
        apart = sorted(selected ^ wanted)
        warnings.warn(
            f"inject_adapter_in_model: the configuration and the state_dict disagree about {len(apart)} modules "
            f"({apart[:3]}); the state_dict is followed",
            RuntimeWarning,
            stacklevel=3,
        )
    return named


def manager_of(model: nn.Module) -> LoraModel:
    """The ``LoraModel`` that ``model`` is, or the one that injected layers into it, behind wrappers of torch's.

    Raises:
        AdapterError: neither.
    """
    model = unwrapped(model)
    if issubclass(type(model), LoraModel):
        return model  # type: ignore[return-value]
    manager: LoraModel | None = vars(model).get(_MANAGER)
    if manager is None:
        raise AdapterError(
            f"expected a model from get_peft_model or inject_adapter_in_model, found a {type(model).__name__}; "
            "pass the wrapped model itself, not the model inside it"
        )
    return manager
