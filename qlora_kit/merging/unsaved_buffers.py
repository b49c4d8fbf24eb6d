"""Buffers that aren't saved under a merge into another dtype: which of them follow it is the model's own business.

Rotary frequencies stay in float32 whatever the model's dtype, sinusoidal tables are made in it, and are added to the
hidden states. No name tells the one from the other, but the model's class does: built anew on the meta device, in the
dtype asked for, it has the buffers that a model loaded in that dtype has.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.neighbours.unpartitioned import unpartitioned
from ..naming import canonical, unwrapped

logger = logging.getLogger(__name__)


def of_another_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Floating-point buffers of a transformers ``model`` that aren't saved, by name, with the dtype that they have in a
    model loaded in ``dtype``, where that isn't theirs. Other models' buffers are left as they are."""
    saved = model.state_dict(keep_vars=True).keys()
    held = {n: b for n, b in model.named_buffers() if n not in saved and b.is_floating_point() and b.dtype != dtype}
    model = unwrapped(model)
    if not held or not hasattr(model, "_from_config"):
        return
    wanted = {name: buffer.dtype for name, buffer in _anew(model, dtype).named_buffers()}
    for name, buffer in held.items():
        found = wanted.get(canonical(name), buffer.dtype)
        if found != buffer.dtype:
            yield name, buffer, found


def _anew(model: Any, dtype: torch.dtype) -> nn.Module:
    """``model`` without weights in ``dtype``; without anything if its class can't be built so."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    try:
        with torch.device("meta"), unpartitioned():
            return type(model)._from_config(config, dtype=dtype)
    except Exception as error:  # whatever a model's own code raises
        logger.warning("merge: buffers that aren't saved keep their dtype, as no other model was to be had (%s)", error)
        return nn.Module()
