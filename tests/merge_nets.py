"""Three linears in every storage, adapters on them, and their weights and states as independent readers see them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from reference import branches, quantization
from torch import Tensor, nn

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix

DENSE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FOUR_BIT: dict[str, dict[str, Any]] = {
    "nf4": {"quant_type": "nf4", "compress_statistics": False},
    "fp4": {"quant_type": "fp4", "compress_statistics": False},
    "nf4-double": {"quant_type": "nf4"},
    "fp4-double": {"quant_type": "fp4"},
    "nf4-in-bfloat16": {"quant_type": "nf4", "quant_storage": torch.bfloat16},
    "nf4-in-float16": {"quant_type": "nf4", "quant_storage": torch.float16},
    "nf4-double-in-float32": {"quant_type": "nf4", "quant_storage": torch.float32},
}
PACKED: dict[str, dict[str, Any]] = {
    "packed-nf3": {"quant_type": "nf3"},
    "packed-signed2-double": {"quant_type": "signed2", "double_quant": True},
    "packed-affine3-double": {"quant_type": "affine3", "double_quant": True},
    "packed-trellis2-double": {"quant_type": "trellis2", "double_quant": True},
    "packed-rotated3": {"quant_type": "rotated3"},
}
KBIT = [*FOUR_BIT, "int8", *PACKED]
STORAGES = [*DENSE, *KBIT]
# Where a write goes into the parameter that is there; the packed layers make a new one.
IN_PLACE = [storage for storage in STORAGES if storage not in PACKED]
PATHS = ("0", "2", "4")


def net(storage: str = "float32") -> nn.Sequential:
    """64 -> 96 -> 64 -> 32; 96 inputs aren't a whole number of blocks of 64."""
    sizes = [(64, 96), (96, 64), (64, 32)]
    first, second, third = (_linear(storage, *size) for size in sizes)
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), third).eval()


def _linear(storage: str, fan_in: int, out: int) -> nn.Module:
    """As the platform makes one."""
    if storage in DENSE:
        return nn.Linear(fan_in, out, dtype=DENSE[storage])
    if storage in PACKED:
        linear = nn.Linear(fan_in, out).requires_grad_(False)
        return pack_linear(linear, quantize_matrix(linear.weight, **PACKED[storage]))
    if storage == "int8":
        return Linear8bitLt(fan_in, out, has_fp16_weights=False).to("cpu")
    return Linear4bit(fan_in, out, compute_dtype=torch.float32, **FOUR_BIT[storage]).to("cpu")


def adapted(storage: str = "float32", names: tuple[str, ...] = ("a",), size: float = 0.3, **config: Any) -> LoraModel:
    """``net`` with adapters of rank 4, alpha 6, whose deltas are of the weights' order times ``size``; all active."""
    lora = None
    for name in names:
        ours = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": list(PATHS), **config})
        if lora is None:
            lora = apply_lora(net(storage), ours, name)
        else:
            lora.add_adapter(name, ours)
    assert lora is not None
    lora.set_adapter(list(names))
    with torch.no_grad():
        for layer in lora.adapter_layers().values():
            for name in names:
                for factor in layer.adapter_tensors(name).values() if name in layer.r else ():
                    # Weights are uniform in 1 / sqrt(64), so of norm 0.07 an entry; B A sums four products.
                    factor.copy_(torch.randn_like(factor) * (0.024 * size) ** 0.5)
    return lora.eval()


def inputs(model: nn.Module) -> Tensor:
    dtype = next((p.dtype for n, p in model.named_parameters() if n.endswith("bias")), torch.float32)
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    return model(inputs(model))


def stored_weight(module: Any) -> np.ndarray:
    """The weight in float64, read by the reference."""
    weight = module.weight
    if isinstance(module, PackedLinear):
        return quantization.read_packed(module)
    if weight.dtype == torch.int8:
        scales = module.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        return quantization.read_int8(weight.data.numpy(), scales.numpy())
    if not hasattr(weight, "quant_state"):
        return branches.array(weight)
    state = weight.quant_state
    levels = quantization.normal_float(4) if state.quant_type == "nf4" else quantization.float4()
    absmax = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        absmax = quantization.scales_8bit(absmax, inner.code.numpy(), inner.absmax.numpy(), state.offset.item())
    packed = weight.data.view(torch.uint8).reshape(-1).numpy()
    return quantization.read_4bit(packed, absmax, levels, state.blocksize, tuple(state.shape))


def delta_of(lora: LoraModel, path: str, names: tuple[str, ...]) -> np.ndarray:
    """The sum of alpha / r * B @ A in float64."""
    layer = lora.adapter_layers()[path]
    factors = [layer.factors(name) for name in names]
    return np.asarray(branches.delta([(branches.array(A), branches.array(B), 6 / 4) for A, B in factors]))


def bits(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Everything that a merge could change: the bits of all tensors, dtypes, identities and flags."""
    seen: dict[str, tuple[Any, ...]] = {}
    for key, value in model.state_dict().items():
        raw = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        seen[key] = (value.dtype, tuple(value.shape), raw)
    for path, module in model.named_modules():
        hooks = [list(module._forward_hooks), list(module._forward_pre_hooks)]
        seen[f"module {path}"] = (id(module), type(module), module.training, hooks)
        for flag in ("active_adapters", "merged_adapters", "disable_adapters"):
            if flag in vars(module):
                seen[f"{flag} {path}"] = (repr(getattr(module, flag)),)
    for name, parameter in model.named_parameters():
        seen[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.dtype)
    return seen


def assert_same_bits(model: nn.Module, before: dict[str, tuple[Any, ...]]) -> None:
    now = bits(model)
    assert list(now) == list(before)
    assert [key for key in now if now[key] != before[key]] == []
