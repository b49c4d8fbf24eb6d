"""DeepSpeed's ZeRO-2, which shares out the optimizer's state and the gradients, and ZeRO-3, which shares out the
parameters too, the frozen base's and its codes included.

By hand it is ``deepspeed.initialize(model=lora, optimizer=..., config=...)``. Beside that:

- dtypes stay as they are: DeepSpeed's own bf16 and fp16 modes would hold the adapters in half precision, and cast 4-bit
  codes that call themselves float32;
- torch's optimizers are taken as they are, on CPUs too, and gradients: DeepSpeed clips them at a norm of 1 unless its
  config says otherwise, as no other engine does;
- under ZeRO-3 factors that lie in a container, whose module nobody calls, are registered with the layer that reads
  them; elsewhere DeepSpeed's hooks on every module gather what it holds, and so adapters compute in the plain form.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import AdapterError, ConfigError
from ..layers import AdapterLayer
from ..model import LoraModel
from ..training.preparation.sharding import casts_codes
from .chosen import keep_to_chosen_

_MODES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def deepspeed() -> Any:
    """The library.

    Raises:
        ImportError: it isn't installed; says how to.
    """
    try:
        return importlib.import_module("deepspeed")
    except ImportError as error:
        raise ImportError(
            "engine 'zero2' or 'zero3': expected DeepSpeed, found none; pip install 'qlora-kit[deepspeed]'"
        ) from error


def partition(
    lora: LoraModel,
    stage: int,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A ``DeepSpeedEngine`` over ``lora`` and ``optimizer``, which has its trained parameters.

    Args:
        stage: 2 or 3.
        config: DeepSpeed's, over what is set here; it needs ``train_micro_batch_size_per_gpu``, which is 1 by default
            and matters to its own loaders and logs only.
        options: further arguments of ``deepspeed.initialize``.

    Raises:
        AdapterError: the config's mode would cast 4-bit codes, or ZeRO-3 is to train adapters that are merge-aware.
        ConfigError: the config is of another stage.
        ImportError: DeepSpeed isn't installed.
    """
    settings = _settings(stage, config or {})
    for mode, dtype in _MODES.items():
        if dict(settings.get(mode, {})).get("enabled") is True:
            _check_codes(lora, mode, dtype)
    if stage == 3:
        _check_none_rounds(lora)
    library = deepspeed()
    if stage == 3:
        register_factors_(lora, library)
    engine, *_ = library.initialize(model=lora, optimizer=optimizer, config=settings, **options)
    keep_to_chosen_(engine, lora, f"zero{stage}")
    return engine


def _settings(stage: int, config: Mapping[str, Any]) -> dict[str, Any]:
    zero = {"stage": stage, **config.get("zero_optimization", {})}
    if zero["stage"] != stage:
        raise ConfigError(
            f"zero_optimization.stage: expected {stage}, as the engine 'zero{stage}' says, found {zero['stage']}"
        )
    as_given = {"gradient_clipping": 0.0, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}
    return {"train_micro_batch_size_per_gpu": 1, **as_given, **config, "zero_optimization": zero}


def register_factors_(lora: LoraModel, library: Any) -> None:
    """Tell ZeRO-3 of parameters that a layer reads from a container: those of no module that is called."""
    for layer in lora.adapter_layers().values():
        for container in layer.factor_names:
            for parameter in layer._modules[container]._parameters.values():  # type: ignore[union-attr]
                library.zero.register_external_parameter(layer, parameter)


def _check_none_rounds(lora: LoraModel) -> None:
    """A layer that computes as it will be merged reads its whole weight before any module of it is called, which is
    when ZeRO-3 gathers."""
    for path, layer in lora.adapter_layers().items():
        if layer.rounding_in_effect(layer.active_adapters) is not None:
            raise AdapterError(
                f"{path}: expected adapters that compute beside their base under ZeRO-3, found one that is trained for "
                "its merge (merge_aware), which needs the whole weight; take 'fsdp2', 'zero2' or 'ddp', or call "
                "set_merge_aware(False)"
            )


def _check_codes(lora: nn.Module, mode: str, dtype: torch.dtype) -> None:
    for path, module in lora.named_modules():
        if not isinstance(module, AdapterLayer) and casts_codes(module, dtype):
            weight: Any = module.weight
            raise AdapterError(
                f"{path}.weight: expected 4-bit codes that DeepSpeed's {mode} mode leaves alone, found codes stored as "
                f"{weight.dtype}, which it would cast as if they were numbers; load the model with "
                f"bnb_4bit_quant_storage={dtype} or torch.uint8, or leave {mode} out: dtypes then stay as they are"
            )
