"""Packed models in transformers: ``AutoModelForCausalLM.from_pretrained(folder)`` builds ``PackedLinear`` layers.

The folder's config.json says which modules are packed and how:

    "quantization_config": {
      "quant_method": "qlora_kit",
      "version": 1,
      "groups": [{"quant_type": "signed2", "blocksize": 64, "double_quant": true, "modules": ["model.layers.0.", ...]}]
    }

A blocksize of null means rows. Modules are full paths, so bits may differ from layer to layer. This module is
imported, and registers with transformers, once both transformers and qlora_kit are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .codecs.packed import PackedLinear
from .errors import ConfigError, TargetError

METHOD = "qlora_kit"
VERSION = 1


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """Which modules hold packed weights, and of what type; see the module's text.

    Raises:
        ConfigError: a version or field that this release doesn't know.
    """

    def __init__(self, groups: Sequence[Mapping[str, Any]] = (), version: int = VERSION, **others: Any) -> None:
        others.pop("quant_method", None)
        if version != VERSION or others:
            found = f"version {version!r}" + (f" and {sorted(others)}" if others else "")
            raise ConfigError(
                f"quantization_config: expected version {VERSION} with 'groups' alone, found {found}; "
                "update qlora-kit, or quantize the model again"
            )
        fields = {"quant_type", "blocksize", "double_quant", "modules"}
        for group in groups:
            if set(group) != fields:
                raise ConfigError(
                    f"quantization_config.groups: expected the fields {sorted(fields)}, found {sorted(group)}; "
                    "the file is damaged or from another release"
                )
        self.quant_method = METHOD  # type: ignore[assignment]  # the enum knows built-in methods only
        self.version = version
        self.groups = [dict(group) for group in groups]

    @classmethod
    def of(cls, modules: Mapping[str, PackedLinear]) -> PackedConfig:
        """The configuration of a model that holds these modules."""
        groups: dict[tuple[str, int, bool], list[str]] = defaultdict(list)
        for path, module in modules.items():
            groups[module.quant_type, module.blocksize, module.double_quant].append(path)
        return cls(
            [
                {"quant_type": kind, "blocksize": blocksize, "double_quant": double, "modules": paths}
                for (kind, blocksize, double), paths in groups.items()
            ]
        )


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """Puts empty ``PackedLinear`` modules where the configuration says, for the loader to fill."""

    requires_calibration = True  # transformers' word for: loads models that are quantized already, no others
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        for group in self.quantization_config.groups:
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
                setattr(model.get_submodule(parent), name, _empty(linear, group))
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from .codecs import codec_for

        for path, module in list(model.named_modules()):
            if isinstance(module, PackedLinear):
                parent, _, name = path.rpartition(".")
                dense = codec_for(module).dense_like(module, dtype or module.compute_dtype)
                setattr(model.get_submodule(parent), name, dense)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def record_quantization_(model: Any) -> None:
    """Make ``model.config`` say how the model's linears are stored, so that ``model.save_pretrained(folder)``
    writes what ``from_pretrained(folder)`` loads.

    For models whose base was quantized in memory: ``record_quantization_(lora.unload())``.

    Raises:
        ConfigError: packed, 4-bit and 8-bit modules are mixed, or of several types, which no configuration of
            transformers describes.
    """
    packed = {path: m for path, m in model.named_modules() if isinstance(m, PackedLinear)}
    stored = {path: m for path, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    if packed and stored:
        raise ConfigError(
            f"the model: expected packed modules or bitsandbytes' alone, found {len(packed)} and {len(stored)}; "
            "quantize all with one quant_type family"
        )
    if packed:
        model.config.quantization_config = PackedConfig.of(packed)
    elif stored:
        model.config.quantization_config = _bitsandbytes_config(model, stored)


def skipped_modules(model: nn.Module, quantized: Sequence[str] | set[str]) -> list[str]:
    """The linears of ``model`` that aren't quantized, as patterns for ``llm_int8_skip_modules``.

    transformers takes a pattern as the end of a path too, so a bare name like "lm_head" is anchored by the
    whole path. A path that a quantized one ends in can't be told apart by it and is written as a regular
    expression.
    """
    import re

    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) or _is_conv1d(module)]
    skipped = [path for path in linears if path not in set(quantized)]
    return [f"^{re.escape(p)}$" if any(q.endswith(p) for q in quantized) else p for p in skipped]


def _bitsandbytes_config(model: nn.Module, stored: Mapping[str, Any]) -> Any:
    kinds = {
        (type(m).__name__, getattr(m.weight, "quant_type", ""), getattr(m.weight, "compress_statistics", None))
        for m in stored.values()
    }
    if len(kinds) > 1:
        raise ConfigError(
            f"the model: expected one way of storing quantized modules, found {sorted(map(str, kinds))}; "
            "quantize all of them alike"
        )
    first = next(iter(stored.values()))
    skip = skipped_modules(model, set(stored))
    if type(first).__name__ == "Linear8bitLt":
        return bitsandbytes_config("int8", torch.float32, skip, threshold=first.state.threshold)
    weight, dtype = first.weight, first.compute_dtype or torch.float32
    return bitsandbytes_config(weight.quant_type, dtype, skip, double_quant=weight.compress_statistics)


def bitsandbytes_config(
    quant_type: str, compute_dtype: torch.dtype, skip: list[str], *, double_quant: bool = False, threshold: float = 0.0
) -> Any:
    """transformers' configuration of a model whose linears but ``skip`` are bitsandbytes' of that type."""
    from transformers import BitsAndBytesConfig

    if quant_type == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skip,
    )


def _linear(model: nn.Module, path: str) -> bool:
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _empty(linear: Any, group: Mapping[str, Any]) -> PackedLinear:
    conv1d = _is_conv1d(linear)
    in_features = linear.nx if conv1d else linear.in_features
    packed: Any = PackedLinear(
        in_features,
        linear.nf if conv1d else linear.out_features,
        bias=linear.bias is not None,
        quant_type=group["quant_type"],
        blocksize=group["blocksize"] or in_features,
        double_quant=group["double_quant"],
        compute_dtype=linear.weight.dtype,
        device="meta",
    ).train(linear.training)
    packed._is_hf_initialized = True  # codes are loaded, never drawn; an architecture's own start may not know them
    if conv1d:
        packed.source_cls = type(linear)
    return packed
