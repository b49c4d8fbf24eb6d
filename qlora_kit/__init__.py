"""qlora-kit: low-rank adapters on quantized models, started where the quantization error is smallest and
merged back with a measured account of what was lost.

Importing this package imports torch, and neither bitsandbytes nor transformers.
"""

from .codecs import Codec, codec_for, register_codec
from .compat.neighbours.on_import import import_after
from .config.lora import LoftQConfig, LoraConfig
from .errors import (
    AdapterError,
    CodecError,
    ConfigError,
    MergeError,
    QLoRAKitError,
    StorageError,
    TargetError,
    UnsupportedModuleError,
)
from .initializers import register_initializer
from .injection.engine import Plan, make_plan
from .layers import AdapterLayer, register_layer, set_branch
from .merging.in_memory import merge
from .merging.report import MergeReport
from .model.lora_model import LoraModel, apply_lora
from .training.preparation.gradients import check_gradients
from .training.preparation.kbit import prepare_model_for_int8_training, prepare_model_for_kbit_training
from .training.preparation.quantize import quantize_

__version__ = "0.1.0"

# transformers learns to load packed models when it is imported, before or after this package.
import_after("transformers.quantizers.auto", "qlora_kit.hf_quantizer")
# And peft to make our adapters of our configurations, where a trainer hands it one.
import_after("peft", "qlora_kit.compat.in_peft")

__all__ = [
    "AdapterError",
    "AdapterLayer",
    "Codec",
    "CodecError",
    "ConfigError",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "MergeError",
    "MergeReport",
    "Plan",
    "QLoRAKitError",
    "StorageError",
    "TargetError",
    "UnsupportedModuleError",
    "apply_lora",
    "check_gradients",
    "codec_for",
    "make_plan",
    "merge",
    "prepare_model_for_int8_training",
    "prepare_model_for_kbit_training",
    "quantize_",
    "register_codec",
    "register_initializer",
    "register_layer",
    "set_branch",
]
