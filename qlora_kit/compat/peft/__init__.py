"""PEFT's names over this toolkit: a script written for PEFT's LoRA runs after changing its import line.

    from qlora_kit.compat.peft import LoraConfig, get_peft_model
    from qlora_kit.compat.peft.tuners.lora import LoraLayer

These are the toolkit's own objects and paths under other names, never copies of them: a ``PeftModel`` is a
``LoraModel``, a ``LoraLayer`` an ``AdapterLayer``, and files are the same. Where PEFT is silent about a mistake
(a target that matches nothing, a key that fits nowhere) this toolkit's errors stay errors. Names of PEFT's other
methods can be imported, and say when used that there is LoRA only.

The files are PEFT's modules, as far as scripts import from them, and hold names alone:

- ``auto``: from an adapter's folder alone to base model and adapter
- ``config``: the base of configurations
- ``functional``: what is done to a bare model with layers injected
- ``helpers``: PEFT's helpers around a model
- ``import_utils``: which libraries are installed
- ``mapping``: methods by their type
- ``mapping_func``: ``get_peft_model``
- ``mixed_model``: ``PeftMixedModel``
- ``optimizers``: optimizers for LoRA's factors
- ``peft_model``: the model classes and their status
- ``tuners/``: methods, of which there is LoRA
- ``utils/``: constants, types, state dicts
"""

from __future__ import annotations

from typing import Any

from ...config.lora import LoftQConfig
from ...layers import AdapterLayer as LoraLayer
from ...model.lora_model import LoraModel
from ...training.preparation.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from ..auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from ..configs import PEFT_VERSION, LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType, get_peft_config
from ..errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from ..foreign import FOREIGN, foreign
from ..injecting import get_peft_model, inject_adapter_in_model
from ..loftq import replace_lora_weights_loftq
from ..model import PeftModel
from ..state import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from ..status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from ..tasks import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

#: The release whose names these are.
__version__ = PEFT_VERSION

__all__ = [
    "AutoPeftModel",
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
    "LoraRuntimeConfig",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "NoMatchingPeftModuleError",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "TaskType",
    "TunerLayerStatus",
    "TunerModelStatus",
    "__version__",
    "get_base_model_state_dict",
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
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    *FOREIGN,
]


def __getattr__(name: str) -> Any:
    """PEFT's other methods."""
    return foreign(name, __name__)
