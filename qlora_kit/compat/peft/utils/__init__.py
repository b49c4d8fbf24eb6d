"""Constants, types, state dicts.

- ``constants``: names of files and of targets
- ``error``: error classes
- ``hotswap``: names of what isn't here
- ``loftq_utils``: ``replace_lora_weights_loftq``
- ``other``: preparation, wrappers, small functions
- ``peft_types``: enumerations
- ``save_and_load``: state dicts
- ``warning``: warning classes
"""

from __future__ import annotations

from typing import Any

from ...foreign import foreign
from .constants import *  # noqa: F403
from .constants import __all__ as _constants
from .error import NoMatchingPeftModuleError, PeftError
from .loftq_utils import replace_lora_weights_loftq
from .other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    _get_submodules,
    id_tensor_storage,
    infer_device,
    prepare_model_for_kbit_training,
    transpose,
)
from .peft_types import PeftType, TaskType
from .save_and_load import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from .warning import PeftWarning

__all__ = [
    "AuxiliaryTrainingWrapper",
    "ModulesToSaveWrapper",
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "_get_submodules",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "id_tensor_storage",
    "infer_device",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "replace_lora_weights_loftq",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "transpose",
    *_constants,
]


def __getattr__(name: str) -> Any:
    return foreign(name, __name__)
