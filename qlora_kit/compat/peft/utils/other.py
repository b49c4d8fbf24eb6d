"""Preparation, wrappers, small functions."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ....errors import ConfigError
from ....layers import ModulesToSave as AuxiliaryTrainingWrapper
from ....layers import ModulesToSave as ModulesToSaveWrapper
from ....training.preparation.kbit import prepare_model_for_kbit_training
from ...foreign import foreign
from .constants import *  # noqa: F403
from .constants import __all__ as _constants

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "fsdp_auto_wrap_policy",
    "id_tensor_storage",
    "infer_device",
    "prepare_model_for_kbit_training",
    "transpose",
    *_constants,
]


def fsdp_auto_wrap_policy(model: nn.Module) -> NoReturn:
    """PEFT's policy of what the first FSDP wraps apart; here adapters are trained under the second.

    Raises:
        ConfigError: always; says what to write instead.
    """
    raise ConfigError(
        f"fsdp_auto_wrap_policy: expected FSDP2, which needs no policy of its own for adapters, found a "
        f"{type(model).__name__} to be wrapped by FSDP1's; leave the call out and set fsdp_version=2 in accelerate's "
        "plugin (in TrainingArguments: fsdp_config={'fsdp_version': 2}), or use qlora_kit.distributed.prepare"
    )


def infer_device() -> str:
    """The kind of accelerator that torch sees, else "cpu"."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """``weight``, transposed if ``fan_in_fan_out``; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors have in common if they share memory: device, address and bytes of it."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The parent of the module at ``key``, that module, and its name in it."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
