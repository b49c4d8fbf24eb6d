"""Our configurations and layers where peft itself meets them; imported right after peft is, and never imports it.

Trainers take ``peft_config=`` with a plain model and hand both to peft. For one of our configurations the adapters are
then ours. Whatever name peft's function goes by in a trainer, it ends in making a ``PeftModel``, so that is the one
place to answer: making one of a configuration of ours gives a model of ours.

transformers' ``model.add_adapter`` has peft's tuner put layers into the bare model instead, and saves them by what peft
knows of its own: the files would lack ours. So the tuner refuses a configuration of ours.

Our layers are registered with peft's abstract class of layers, by which trainers refuse adapters on an output head
whose weight they read themselves.
"""

from __future__ import annotations

from typing import Any

from ..config.lora import LoraConfig
from ..errors import ConfigError
from ..layers import AdapterLayer
from .neighbours.passing import loaded
from .peft import get_peft_model


def _new(
    cls: type,
    model: Any = None,
    peft_config: Any = None,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    **_: Any,
) -> Any:
    """peft's ``PeftModel.__new__``: an empty model of ``cls``, or for our own configuration a finished one of ours."""
    if issubclass(type(peft_config), LoraConfig):
        mixed = cls is loaded("peft", "PeftMixedModel")
        return get_peft_model(
            model,
            peft_config,
            adapter_name,
            mixed,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    return object.__new__(cls)


def _new_tuner(cls: type, model: Any = None, config: Any = None, *_: Any, **__: Any) -> Any:
    """peft's ``LoraModel.__new__``: an empty tuner.

    Raises:
        ConfigError: for one of our configurations.
    """
    if issubclass(type(config), LoraConfig):
        raise ConfigError(
            "config: expected peft's own LoraConfig, since transformers' model.add_adapter and peft's "
            "inject_adapter_in_model put peft's layers on, found this toolkit's; pass it to "
            "get_peft_model(model, config) of qlora_kit.compat.peft, or for a model without a wrapper to "
            "inject_adapter_in_model there"
        )
    return object.__new__(cls)


def _meet_() -> None:
    models = [kind for name in ("PeftModel", "PeftMixedModel") if (kind := loaded("peft", name)) is not None]
    for kind in models:
        kind.__new__ = staticmethod(_new)  # type: ignore[method-assign, assignment]
    tuner: Any = loaded("peft.tuners.lora", "LoraModel")
    if tuner is not None:
        tuner.__new__ = staticmethod(_new_tuner)
    layer: Any = loaded("peft.tuners.tuners_utils", "BaseTunerLayer")
    if layer is not None:
        layer.register(AdapterLayer)


_meet_()
