"""What ``LoraConfig.megatron_config`` and ``megatron_core`` say, held against the model.

Megatron's modules carry their own configuration, groups and sizes, so an adapter needs neither field. Where they are
given they are believed only as far as they fit: ``megatron_core`` names the library whose types are to be known, a fork
of ``megatron.core``; ``megatron_config`` has to be arguments of its TransformerConfig that describe this model. How a
run is shared out (sizes of groups, sequence parallelism, dtypes) may differ from one to the next and isn't compared.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

from torch import nn

from ...config.lora import LoraConfig
from ...errors import ConfigError, closest
from ...layers.sharded.megatron.types import add_library
from ...naming import every_module

#: The library that ``megatron_core`` names by default.
CORE = "megatron.core"
_OF_THE_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
    "gated_linear_unit",
)


def follow_settings(config: LoraConfig, model: nn.Module) -> None:
    """Have the library that ``config`` names known, and check what it says of ``model``.

    Raises:
        ConfigError: ``megatron_config`` is given and that library isn't installed, doesn't know an argument, or the
            model is another.
    """
    core = config.megatron_core or CORE
    if core != CORE:
        add_library(core)
    if not config.megatron_config:  # one without arguments says nothing
        return
    described = _described(core, config.megatron_config)
    own = next(
        (found for module in every_module(model) if (found := _config_of(module, type(described))) is not None), None
    )
    for name in _OF_THE_MODEL if own is not None else ():
        if name in config.megatron_config and (there := getattr(own, name)) != (said := getattr(described, name)):
            raise ConfigError(
                f"megatron_config: expected a description of this model, whose {name} is {there}, found {said}; pass "
                "the arguments that the model was made with, or leave megatron_config out"
            )


def settings_that_hold(stored: LoraConfig, model: nn.Module) -> dict[str, Any] | None:
    """``megatron_config`` of a stored adapter; where it can't be read here, or is that of another model, None, and a
    warning says so: what the adapter computes is its tensors' to say, and whether they fit is checked with them."""
    try:
        follow_settings(stored, model)
    except ConfigError as error:
        warnings.warn(f"of a stored adapter, hence passed over: {error}", stacklevel=2)
        return None
    return stored.megatron_config


def _described(core: str, arguments: dict[str, Any]) -> Any:
    """The library's TransformerConfig of ``arguments``."""
    try:
        found = importlib.import_module(f"{core}.transformer.transformer_config")
    except ImportError as error:
        fix = "install megatron-core, e.g. pip install 'qlora-kit[megatron]'" if core == CORE else f"install {core}"
        raise ConfigError(
            f"megatron_config: expected the library {core!r}, whose configuration it is, found none ({error}); {fix}, "
            "or leave megatron_config out: Megatron's own modules say all that an adapter needs"
        ) from error
    try:
        return found.TransformerConfig(**arguments)
    except Exception as error:  # of any kind: it divides by what it wasn't given
        known = list(getattr(found.TransformerConfig, "__dataclass_fields__", ()))
        unknown = [name for name in arguments if known and name not in known]
        near = f"; nearest to {unknown[0]!r}: {closest(unknown[0], known)}" if unknown else ""
        raise ConfigError(
            f"megatron_config: expected arguments of {core}'s TransformerConfig, found others ({error}){near}; correct "
            "them, or leave megatron_config out"
        ) from error


def _config_of(module: nn.Module, kind: type) -> Any:
    own = vars(module).get("config")
    return own if isinstance(own, kind) else None
