"""Which libraries are installed, as PEFT asks: ``is_bnb_available()`` and the like."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

# By the middle of PEFT's function name, the package that it looks for.
_PACKAGES = {
    "aqlm": "aqlm",
    "bnb": "bitsandbytes",
    "bnb_4bit": "bitsandbytes",
    "diffusers": "diffusers",
    "eetq": "eetq",
    "gptqmodel": "gptqmodel",
    "hqq": "hqq",
    "inc": "neural_compressor",
    "optimum": "optimum",
    "te": "transformer_engine",
    "torchao": "torchao",
}
_ASKING = {f"is_{name}_available": package for name, package in _PACKAGES.items()}

#: No older transformers can be installed beside this toolkit.
is_transformers_ge_v5 = True


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether torch sees one of Intel's GPUs; with ``check_device`` whether it can also be used."""
    if check_device and torch.xpu.is_available():
        return torch.xpu.device_count() > 0
    return torch.xpu.is_available()


def __getattr__(name: str) -> Callable[[], bool]:
    if name not in _ASKING:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {sorted(_ASKING)}")
    return lambda: find_spec(_ASKING[name]) is not None
