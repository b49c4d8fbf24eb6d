"""Models whose config.json names its quantized modules, in transformers: ``from_pretrained(folder)`` builds them empty
where the configuration says, and fills them from the shards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..codecs.packed import PackedLinear
from ..errors import TargetError
from .config import METHOD, PackedConfig, Stored
from .stock import BITSANDBYTES_TYPES, forget_gathering_, is_conv1d
from .tensor_parallel import share_out_, taken_aside

# What bitsandbytes stores of one weight, by transformers' names.
_PARTS_4BIT = (
    *("weight.nested_absmax", "weight.nested_quant_map", "weight.quant_map", "weight.absmax"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)
_PARTS_8BIT = ("SCB", "weight_format")


class _Gathered(ConversionOps):
    """A weight of bitsandbytes from its parts, in their own dtypes; other weights in the dtype that was asked for."""

    def __init__(self, hf_quantizer: PackedQuantizer) -> None:
        self.hf_quantizer = hf_quantizer
        self.dtype: torch.dtype | None = None

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        from transformers.integrations.bitsandbytes import Bnb4bitDeserialize, Bnb8bitDeserialize

        if len(input_dict) == 1:
            return {
                name: self._cast(value[0] if isinstance(value, list) else value) for name, value in input_dict.items()
            }
        kind = Bnb8bitDeserialize if "SCB" in input_dict else Bnb4bitDeserialize
        return kind(self.hf_quantizer).convert(input_dict, *args, **kwargs)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() and self.dtype is not None else tensor


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty modules where the configuration says, for the loader to fill."""

    requires_calibration = True  # transformers' word for: loads models that are quantized already, no others
    quantization_config: PackedConfig
    _styles: dict[str, str] = {}  # noqa: RUF012 - replaced, never written to

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for group in self.quantization_config.groups:
            stored = Stored.of_group(group)
            for path in group["modules"]:
                # A checkpoint of a whole model may be loaded without its head, or the other way round.
                found = next((p for p in (path, path.removeprefix(prefix), prefix + path) if _linear(model, p)), None)
                if found is None:
                    raise TargetError(
                        f"quantization_config: expected a linear layer at {path!r}, found none in "
                        f"{type(model).__name__}; the config belongs to another architecture"
                    )
                parent, _, name = found.rpartition(".")
                linear = model.get_submodule(found)
                setattr(model.get_submodule(parent), name, _empty(linear, stored))
        return model

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Take what ``plan``, the model's, says of modules of few bits aside until they are loaded."""
        super().update_parallel_plan(model, plan)
        if plan is model.tp_plan:
            kinds = (*BITSANDBYTES_TYPES, PackedLinear.__name__)
            paths = [path for path, module in model.named_modules() if type(module).__name__ in kinds]
            self._styles = taken_aside(model, plan, paths)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        forget_gathering_(model)
        share_out_(model, self._styles)
        return model

    def get_weight_conversions(self) -> list[Any]:
        """The gathering of bitsandbytes' weights, where there are any."""
        from transformers.core_model_loading import WeightConverter

        if not any(Stored.of_group(group).bitsandbytes for group in self.quantization_config.groups):
            return []
        return [WeightConverter(["weight", *_PARTS_4BIT, *_PARTS_8BIT], "weight", [_Gathered(self)])]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What transformers casts a stored tensor to: as ever, but that a weight's parts aren't known from other
        weights before all are there."""
        gathering = [op for op in getattr(converter, "operations", ()) if isinstance(op, _Gathered)]
        for operation in gathering:
            operation.dtype = dtype
        return None if gathering else super().get_new_dtype(converter, param, dtype)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether it is a weight of bitsandbytes, whose shape in memory isn't the one before it was filled."""
        path, _, name = param_name.rpartition(".")
        return name == "weight" and type(model.get_submodule(path)).__name__ in BITSANDBYTES_TYPES

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from ..codecs import codec_for

        if isinstance(dtype, str):  # as transformers leaves it in a configuration that it has saved
            dtype = getattr(torch, dtype)
        for path, module in list(model.named_modules()):
            if isinstance(module, PackedLinear) or type(module).__name__ in BITSANDBYTES_TYPES:
                parent, _, name = path.rpartition(".")
                codec = codec_for(module, path)
                dense = codec.dense_like(module, dtype or codec.compute_dtype(module))
                setattr(model.get_submodule(parent), name, dense)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _linear(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _empty(linear: Any, stored: Stored) -> nn.Module:
    conv1d = is_conv1d(linear)
    sizes = (linear.nx, linear.nf) if conv1d else (linear.in_features, linear.out_features)
    dtype, bias = linear.weight.dtype, linear.bias is not None
    if stored.bitsandbytes:
        from ..codecs.bnb import empty_linear

        module: Any = empty_linear(
            *sizes, bias, stored.quant_type, double_quant=stored.double_quant, threshold=stored.threshold, dtype=dtype
        )
    else:
        module = PackedLinear(
            *sizes,
            bias=bias,
            quant_type=stored.quant_type,
            blocksize=stored.blocksize or sizes[0],
            double_quant=stored.double_quant,
            compute_dtype=dtype,
            device="meta",
        )
    if conv1d or stored.bitsandbytes:  # transformers' deserializers ask what stood there
        module.source_cls = type(linear)
    # All of it comes from the shards; some architectures would draw it first, by the shape of a dense weight.
    module._is_hf_initialized = True
    return module.train(linear.training)
