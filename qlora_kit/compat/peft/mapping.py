"""PEFT's tables from the type of a method to what implements it. Here each has one line."""

from ...model.lora_model import LoraModel
from ..configs import LoraConfig, PeftType, get_peft_config
from ..injecting import inject_adapter_in_model
from ..model import PeftModel

PEFT_TYPE_TO_CONFIG_MAPPING = {PeftType.LORA: LoraConfig}
PEFT_TYPE_TO_TUNER_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING = {PeftType.LORA: PeftModel.prefix}

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "get_peft_config",
    "inject_adapter_in_model",
]
