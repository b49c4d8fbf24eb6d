"""The tensors of an adapter made whole: gathered where an engine keeps them in pieces, refused where they are pieces
that nobody can put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..codecs.shards.tensors import (
    is_partitioned,
    is_sharded,
    is_writer,
    meet,
    ranks_of,
    to_pieces_,
    whole,
    whole_shape,
)
from ..errors import StorageError
from .keys import factor
from .slots import Slot


def roles(model: nn.Module, is_main_process: bool | None, *, gathered: bool) -> tuple[bool, bool]:
    """Whether this process takes part in saving, and whether it writes: of a model in pieces the first does unless the
    caller says who, and all take part unless the caller has gathered."""
    to_pieces_(model)
    sharded = any(map(is_sharded, model.parameters()))
    writes = (not sharded or is_writer()) if is_main_process is None else is_main_process
    return writes or (sharded and not gathered), writes


def check_gatherable(adapter_name: str, slots: Sequence[Slot]) -> None:
    """Refuse factors that are pieces of themselves, of an engine that doesn't say how to put them together."""
    own = [slot for slot in slots if not slot.of_base and not is_sharded(slot.tensor) and factor(slot.key)]
    if bad := [slot.name for slot in own if slot.tensor.numel() == 0 or slot.tensor.ndim < 2]:
        raise StorageError(
            f"adapter {adapter_name!r}: expected whole factors, found {len(bad)} of {len(own)} that are empty or flat "
            f"pieces ({bad[:3]}); gather them first and pass state_dict=..., as accelerator.get_state_dict(model) does"
        )


def checked(adapter_name: str, slots: Sequence[Slot], found: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """``found``, what a state dict has for each of ``slots``, if that is all and whole."""
    good: dict[str, Tensor] = {}
    bad: list[str] = []
    for slot in slots:
        tensor, shape = found[slot.key], whole_shape(slot.tensor)
        if tensor is not None and (whole_shape(tensor) == shape or slot.moved_by):
            good[slot.key] = tensor
        else:
            what = "nothing" if tensor is None else f"{tuple(whole_shape(tensor))}, not {tuple(shape)}"
            bad.append(f"{slot.name}: {what}")
    if bad:
        zero3 = any(is_partitioned(slot.tensor) for slot in slots)
        trainers = "; a Trainer does where peft is installed, or stage3_gather_16bit_weights_on_model_save is set"
        raise StorageError(
            f"state_dict: expected all tensors of adapter {adapter_name!r}, found {len(bad)} of {len(slots)} missing "
            f"or empty or in part ({bad[:3]}); gather the shards first, or pass no state_dict{trainers * zero3}"
        )
    return good


def gathered(adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies of ``tensors`` on the CPU, whole; every process that holds parts of them has to call this."""
    meet(ranks_of(tensors.values()), f"saving adapter {adapter_name!r} of a sharded model")
    return {key: _copy(tensor) for key, tensor in tensors.items()}


def _copy(tensor: Tensor) -> Tensor:
    if tensor.is_meta:  # there is nothing to copy, and what has no memory can be told by that
        return tensor.detach()
    return whole(tensor).to("cpu", copy=True).contiguous()
