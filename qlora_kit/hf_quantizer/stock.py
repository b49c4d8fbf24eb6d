"""transformers' own configuration of a bitsandbytes model, and what its loader would build by it.

The loader goes by rule: modules that are exactly ``nn.Linear`` (or ``Conv1D``), but for a list of patterns and for what
the architecture keeps in float32; subclasses with a forward of their own stay dense, and Llama 4's stacked experts are
taken apart. The rule changes from release to release, so it isn't written again: ``built_by_rule`` has transformers
apply it to the model's skeleton on the meta device, as loading does, which costs what building the skeleton costs.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..compat.neighbours.unpartitioned import unpartitioned
from ..naming import Tree, base_of

BITSANDBYTES_TYPES = ("Linear4bit", "Linear8bitLt")


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


def skipped_modules(model: nn.Module, quantized: Collection[str]) -> list[str]:
    """The linears of ``model`` that aren't quantized, as patterns for ``llm_int8_skip_modules``.

    transformers takes a pattern as the end of a path too, so a bare name like "lm_head" is anchored by the
    whole path. A path that a quantized one ends in can't be told apart by it and is written as a regular
    expression.
    """
    modules = {path: base_of(module) for path, module in Tree(model).firsts()}
    linears = [path for path, module in modules.items() if isinstance(module, nn.Linear) or is_conv1d(module)]
    skipped = [path for path in linears if path not in set(quantized)]
    return [f"^{re.escape(p)}$" if any(q.endswith(p) for q in quantized) else p for p in skipped]


def built_by_rule(model: Any, config: Any) -> set[str] | None:
    """The paths at which transformers' loader puts bitsandbytes' modules into a model like ``model``.

    Args:
        model: of transformers; its class and configuration count, not what stands in it now.
        config: see ``bitsandbytes_config``.

    Returns:
        None if the loader also takes other modules apart, so that tensors stored under the model's own names find no
        place.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    bare = _skeleton(model)
    names = {name for name, _ in bare.named_parameters()}
    with _unwarned():  # that a model has no linear of its own kind is an answer here
        AutoHfQuantizer.from_config(config, pre_quantized=True).preprocess_model(bare, device_map=None)
    if {name for name, _ in bare.named_parameters()} != names:
        return None
    return {path for path, module in bare.named_modules() if type(module).__name__ in BITSANDBYTES_TYPES}


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' linear layer with its weight stored (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def forget_gathering_(model: Any) -> Any:
    """Drop the steps by which transformers gathered quantized weights from their parts while loading, and return what
    all of its steps were: it would undo them on saving, and can't, though the parts are what the modules' state is."""
    steps = getattr(model, "_weight_conversions", None)
    if steps:
        kept = [s for s in steps if not any(hasattr(op, "hf_quantizer") for op in getattr(s, "operations", ()))]
        model._weight_conversions = kept
    return steps


@contextmanager
def _unwarned() -> Iterator[None]:
    logger = logging.getLogger("transformers.integrations.bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _skeleton(model: Any) -> Any:
    """A dense model of the same class and configuration on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), unpartitioned():
        return type(model)._from_config(config)
