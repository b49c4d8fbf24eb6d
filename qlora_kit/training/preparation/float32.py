"""Modules held in float32 in a model of half precision, and the way back.

Why hooks. A float32 norm in a bfloat16 model hands on float32 (its weight promotes the product), and the next
dense linear refuses that input. So a module that was cast computes in float32 inside and speaks the model's
dtype outside: one hook casts what comes in, one casts what goes out. A hook changes no parameter name and
survives deepcopy, pickle and torch.compile; a wrapping module would change every name below it.

The first hook also says which tensors were cast and from which dtype. So a copy of the module knows its way back as the
module does, and what is only held (not trained) goes back bit for bit: widening a half is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...codecs import registered_codec
from ...layers.saved import whole_copy_dtype
from ...naming import every_module

HALF = (torch.float16, torch.bfloat16)


def hold_in_float32_(model: nn.Module, chosen: list[nn.Module], keep_output: nn.Module | None) -> None:
    """Store half-precision modules in float32; all but ``keep_output`` go on giving the dtype they gave.

    A module that shares a weight with a chosen one is treated like it, and shares it still.
    """
    weights = {id(p) for m in chosen for p in m._parameters.values() if p is not None and p.dtype in HALF}
    sharing = []
    for module in model.modules():
        own = {n: p for n, p in module._parameters.items() if p is not None and id(p) in weights}
        if own:
            buffers = {n: b for n, b in module._buffers.items() if b is not None and b.dtype in HALF}
            sharing.append((module, own, {name: tensor.dtype for name, tensor in (*own.items(), *buffers.items())}))
    for module, own, before in sharing:
        for parameter in own.values():
            parameter.data = parameter.data.float()
        for name in before.keys() - own.keys():
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = buffer.float()
        module.register_forward_pre_hook(partial(_cast_inputs, before=before), with_kwargs=True)
        if module is not keep_output:
            dtype = next(iter(before.values()))
            module.register_forward_hook(partial(_cast_output, dtype=dtype))


def held_in_float32(model: nn.Module) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Every tensor that is still held, by its name, with the dtype it had before; a shared one once for each name."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if getattr(hook, "func", None) is _cast_inputs:
                for name, dtype in hook.keywords["before"].items():
                    tensor = module._parameters.get(name, module._buffers.get(name))
                    codes = name == "weight" and _is_quantized(module)  # which may share elements of a float's type
                    if tensor is not None and tensor.dtype is torch.float32 and not codes:
                        yield f"{path}.{name}".lstrip("."), tensor, dtype


def _is_quantized(module: nn.Module) -> bool:
    codec = registered_codec(module)
    return codec is not None and codec.quantizer(module) is not None


def release_from_float32_(model: nn.Module) -> None:
    """Take the casts around modules held in float32 off again, once the model computes in one dtype."""
    for module in every_module(model):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if getattr(hook, "func", None) in (_cast_inputs, _cast_output):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _cast_inputs(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, before: Mapping[str, torch.dtype]
) -> tuple[Any, Any]:
    return tuple(_widened(a) for a in args), {name: _widened(a) for name, a in kwargs.items()}


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in HALF else value


def _cast_output(module: nn.Module, args: tuple[Any, ...], output: Tensor, *, dtype: torch.dtype) -> Tensor:
    return output.to(whole_copy_dtype(module) or dtype)
