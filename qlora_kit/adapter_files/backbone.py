"""Which quantized base an adapter was started on, as a short fingerprint that travels with the adapter.

A LoftQ adapter makes up for the rounding of one particular base: on the original model, or on the same model
quantized another way, it only adds error, and nothing about shapes or names would tell. The fingerprint is a
SHA-256 over the paths of the adapted modules and up to 4,096 bytes of each one's codes, evenly spaced, which any
other rounding of the weight changes. It reads the same whatever the device and the storage type of the codes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..codecs import codec_for
from ..errors import StorageError
from ..layers.sharded.sharding import sharding_of
from ..layers.sharded.whole import whole_module

METADATA_KEY = "backbone"  # in the metadata of adapter_model.safetensors
_SAMPLES = 4096


def fingerprint(modules: Mapping[str, nn.Module]) -> str:
    """Of base modules by their path: 32 hexadecimal digits."""
    return combine({path: module_digest(module) for path, module in modules.items()})


def combine(digests: Mapping[str, str]) -> str:
    """The fingerprint of modules by path, from each one's ``module_digest``."""
    text = "\n".join(f"{path} {digests[path]}" for path in sorted(digests))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@torch.no_grad()
def module_digest(module: nn.Module) -> str:
    """Of one module's codes; of those that all processes hold together where it is sharded, so every one has to ask."""
    if (sharding := sharding_of(module)) is not None:
        module = whole_module(module, sharding)
    return codes_digest(codec_for(module).stored(module)[0])


def codes_digest(codes: Tensor) -> str:
    """Of up to 4,096 bytes of ``codes``; dense weights count in bfloat16, whatever they are held in."""
    flat = codes.detach().reshape(-1)
    if flat.is_floating_point():
        flat = flat[:: max(1, flat.numel() // (_SAMPLES // 2))].to(torch.bfloat16)
    flat = flat.contiguous().view(torch.uint8)
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].cpu()
    return hashlib.sha256(codes.numel().to_bytes(8, "little") + sample.numpy().tobytes()).hexdigest()


def check_backbone(expected: str, modules: Mapping[str, nn.Module], source: object) -> None:
    """Raise a StorageError unless ``modules`` are the backbone that the adapter in ``source`` was started on."""
    found = fingerprint(modules)
    if found != expected:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise StorageError(
            f"{source}: expected the quantized base model that this adapter was started on (fingerprint "
            f"{expected[:12]}), found another ({found[:12]}, of {', '.join(kinds)}), on which its correction is "
            "noise; load the base that was saved with it, or pass check_backbone=False to load it all the same"
        )
