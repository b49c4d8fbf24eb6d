"""What FSDP2 can't shard, or would compute garbage of, said before the first step.

FSDP2 reduces the gradients of a group (what one ``fully_shard`` call takes, without the groups inside it) in one
buffer, so what is trained there needs one dtype; torch asserts it in the first forward, without names. It casts
floating parameters to its policy's ``param_dtype`` as it gathers them: 4-bit codes that call themselves float32 would
be cast as if they were numbers. And a parameter that carries more than its values, as bitsandbytes' int8 ones do, is
gathered without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ...codecs import registered_codec
from ...codecs.shards.tensors import is_dtensor
from ...errors import AdapterError

#: Modules of a group by path.
Group = list[tuple[str, nn.Module]]


def check_sharded(model: nn.Module) -> None:
    """Check the groups of ``model``, on parts of which ``fully_shard`` has been called.

    Raises:
        AdapterError: one can't be trained; it names the parameters, their dtypes and what to do.
    """
    for path, module in model.named_modules():
        if (state := _state(module)) is not None:
            group = list(group_of(path, module, lambda child: _state(child) is not None))
            check_group(group, getattr(getattr(state, "_mp_policy", None), "param_dtype", None), sharded=True)


def check_group(group: Group, param_dtype: torch.dtype | None, *, sharded: bool = False) -> None:
    """Check that a group trains in one dtype, and that its codes survive a policy of ``param_dtype``.

    Args:
        sharded: it has been sharded: what stayed whole isn't of it, and int8 weights have to be that.
    """
    trained: dict[torch.dtype, list[str]] = {}
    for path, module in group:
        for name, parameter in module._parameters.items():
            if parameter is not None and (is_dtensor(parameter) or not sharded):
                _check_codes(f"{path}.{name}", module, parameter, param_dtype, sharded)
                if parameter.requires_grad:
                    trained.setdefault(parameter.dtype, []).append(f"{path}.{name}")
    if len(trained) > 1:
        listed = "; ".join(f"{len(names)} of {dtype} ({names[0]}, ...)" for dtype, names in trained.items())
        raise AdapterError(
            f"{group[0][0] or 'model'}: expected trained parameters of one dtype in what FSDP2 shards together, found "
            f"{listed}; give them one before sharding, float32 for biases (parameter.data = parameter.data.float()) or "
            "another adapter_dtype for factors and copies, or train no biases"
        )


def _check_codes(
    name: str, module: Any, parameter: nn.Parameter, param_dtype: torch.dtype | None, sharded: bool
) -> None:
    if sharded and stays_whole(module, parameter):
        raise AdapterError(
            f"{name}: expected an int8 weight whole on every process, found it sharded, without its scales; name such "
            "weights in fully_shard(..., ignored_params=...), as qlora_kit.distributed.prepare does (with accelerate: "
            "FullyShardedDataParallelPlugin(..., ignored_modules=r'.*base_layer')), or use 4 bits"
        )
    own = parameter is module._parameters.get("weight")
    if own and param_dtype is not None and casts_codes(module, param_dtype):
        raise AdapterError(
            f"{name}: expected 4-bit codes that the mixed-precision policy leaves alone, found codes stored as "
            f"{parameter.dtype} under param_dtype={param_dtype}, which would cast them as if they were numbers; load "
            f"the model with bnb_4bit_quant_storage={param_dtype} or torch.uint8, or shard with "
            f"param_dtype={parameter.dtype}"
        )


def casts_codes(module: Any, dtype: torch.dtype) -> bool:
    """Whether an engine that casts floating-point weights to ``dtype`` would cast the 4-bit codes of ``module``."""
    coded = getattr(module, "quant_state", None) is not None
    return coded and module.weight.is_floating_point() and module.weight.dtype != dtype


def stays_whole(module: nn.Module, parameter: Any) -> bool:
    """Whether ``parameter`` of ``module`` can't be sharded; FSDP2's ``ignored_params`` have to name it."""
    codec = registered_codec(module)
    return codec is not None and not codec.can_be_sharded and not parameter.is_floating_point()


def groups(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[Group]:
    """The groups that ``fully_shard`` makes of ``blocks`` and then of ``model``."""
    heads = {id(block) for block in blocks}
    for path, module in model.named_modules():
        if module is model or id(module) in heads:
            yield list(group_of(path, module, lambda child: id(child) in heads))


def group_of(path: str, module: nn.Module, is_other: Callable[[nn.Module], bool]) -> Iterator[tuple[str, nn.Module]]:
    """``module`` and those below it, without the modules that are groups of their own and what is below these."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not is_other(child):
            yield from group_of(f"{path}.{name}" if path else name, child, is_other)


def _state(module: nn.Module) -> Any:
    """FSDP2's state of ``module``, if it was called on it."""
    get = getattr(type(module), "_get_fsdp_state", None)
    return None if get is None else get(module)
