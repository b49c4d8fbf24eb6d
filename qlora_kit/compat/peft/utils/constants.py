"""Names of files and of targets."""

from ....adapter_files.folder import PICKLE_NAME as WEIGHTS_NAME
from ....adapter_files.folder import WEIGHTS_NAME as SAFETENSORS_WEIGHTS_NAME
from ....config.lora import CONFIG_NAME
from ....injection.architectures import DEFAULT_TARGETS

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
INCLUDE_LINEAR_LAYERS_SHORTHAND = "all-linear"
SEQ_CLS_HEAD_NAMES = ["score", "classifier"]
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = {kind: list(names) for kind, names in DEFAULT_TARGETS.items()}

__all__ = [
    "CONFIG_NAME",
    "EMBEDDING_LAYER_NAMES",
    "INCLUDE_LINEAR_LAYERS_SHORTHAND",
    "SAFETENSORS_WEIGHTS_NAME",
    "SEQ_CLS_HEAD_NAMES",
    "TOKENIZER_CONFIG_NAME",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "WEIGHTS_NAME",
]
