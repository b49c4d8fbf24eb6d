"""What an optimizer keeps of each parameter, whole, whichever engine shares it out.

torch's optimizers keep a dictionary a parameter: tensors of its shape (DTensors under FSDP2), and numbers. DeepSpeed's
keep the same of flat partitions, and know which part of which is a parameter's. Here both are a dictionary of whole
tensors by name, and so a state saved under one engine is loaded under another.

``MASTER`` is the float32 copy that DeepSpeed steps where the parameter itself has fewer bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs.shards.tensors import fill_, is_partitioned, partition_of, whole
from ..errors import StorageError

MASTER = "master"


def bare(optimizer: Any) -> Any:
    """torch's optimizer, or DeepSpeed's, below what accelerate wraps around it."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer


def of_deepspeed(optimizer: Any) -> bool:
    return type(optimizer).__module__.startswith("deepspeed.")


def read_state(optimizer: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What ``optimizer`` keeps of ``parameter``, on the CPU; empty before its first step. A collective where it is
    shared out."""
    if of_deepspeed(optimizer):
        return {name: value.cpu() for name, value in _read_partitions(optimizer, parameter).items()}
    state = optimizer.state.get(parameter, {})
    return {name: whole(_tensor(value)).to("cpu", copy=True) for name, value in state.items() if value is not None}


@torch.no_grad()
def write_state_(optimizer: Any, states: Sequence[tuple[nn.Parameter, Mapping[str, Tensor]]]) -> None:
    """Give ``optimizer`` for each parameter what ``read_state`` read."""
    if of_deepspeed(optimizer):
        _write_partitions_(optimizer, states)
        return
    # Compiled into one kernel, steps are counted where the parameters are.
    near = {id(p) for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]}
    for parameter, state in states:
        made: dict[str, Any] = {}
        for name, value in state.items():
            if name == MASTER:
                fill_(parameter, value)
            elif value.shape == parameter.shape and value.ndim:
                made[name] = torch.zeros_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format)
                fill_(made[name], value)
            else:
                made[name] = value.clone().to(parameter.device if id(parameter) in near else "cpu")
        optimizer.state.pop(parameter, None)
        if made:
            optimizer.state[parameter] = made


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


# -- DeepSpeed ---------------------------------------------------------------------------------------------------


def _flats(optimizer: Any) -> list[Tensor]:
    """The flat float32 partitions that the optimizer within steps."""
    found = getattr(optimizer, "fp32_partitioned_groups_flat", None)
    flats: list[Tensor] = optimizer.single_partition_of_fp32_groups if found is None else found
    return flats


def _read_partitions(optimizer: Any, parameter: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    inner = optimizer.optimizer.state.get(_flats(optimizer)[0], {})
    for name, value in inner.items():
        value = _tensor(value)
        found[name] = value.detach().clone() if not value.ndim else _whole(parameter, name)
    if parameter.dtype != torch.float32:
        found[MASTER] = _whole(parameter, None)
    return found


def _whole(parameter: Any, name: str | None) -> Tensor:
    if is_partitioned(parameter):
        value: Tensor = parameter._z3_optimizer.get_full_hp_param(parameter, name)
    else:
        value = parameter.get_full_hp_param(name)
    return value.detach().clone()


def _write_partitions_(optimizer: Any, states: Sequence[tuple[Any, Mapping[str, Tensor]]]) -> None:
    names = {name: value for _, state in states for name, value in state.items() if name != MASTER}
    for flat in _flats(optimizer):
        own = optimizer.optimizer.state[flat]
        for name, value in names.items():
            own[name] = torch.zeros_like(flat) if value.ndim else value.clone()
    if hasattr(optimizer, "_hp_optimizer_states_linked"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    for parameter, state in states:
        for name, value in state.items():
            if value.ndim:
                key = None if name == MASTER else name
                if is_partitioned(parameter):
                    parameter._z3_optimizer.set_local_hp_param(partition_of(parameter, value), parameter, key)
                else:
                    parameter.set_full_hp_param(value.float(), key)


def check_steps(optimizer: Any, trained: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer of other parameters than ``trained``; of some of these it may have no state, as of a layer
    that no batch has come to."""
    if of_deepspeed(optimizer):
        return  # it has put its own in their place
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if others := [name for name, parameter in trained.items() if id(parameter) not in held]:
        raise StorageError(
            f"optimizer: expected one that has all {len(trained)} parameters that train, found {len(others)} that it "
            f"hasn't ({others[:3]}); make it of the parameters that train now, under FSDP2 after the model is sharded"
        )
