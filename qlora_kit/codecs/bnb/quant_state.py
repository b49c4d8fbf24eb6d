"""bitsandbytes' ``QuantState`` of a 4-bit weight: found, made, copied, and filled with codes and scales that we chose.

Codes and block scales come from ``quantize_matrix``, which finds those of bitsandbytes' ``quantize_4bit`` in a fraction
of the time. One thing is left to its kernel: bringing the scales themselves to 8 bits (double quantization), where its
CPU kernel takes the neighbour of the nearest for a few in a thousand. Both together are, bit for bit, what bitsandbytes
stores by itself; a test holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, create_dynamic_map, get_4bit_type, quantize_blockwise
from torch import Tensor

from ...errors import CodecError
from ..blockwise import search_codes
from ..packing import pack
from ..quantized import SCALES_BLOCKSIZE, Quantized

# The least scale that bitsandbytes gives a short last block; whole blocks may have 0.
_LEAST_OF_A_TAIL = 1e-38


def state_of(module: Any) -> QuantState | None:
    """The 4-bit state; sharding and conversion can lose the weight's while the module keeps its own."""
    state = getattr(module.weight, "quant_state", None)
    return module.quant_state if state is None else state


def adopt_(module: Any, state: QuantState) -> None:
    """Make ``state`` the module's and its weight's."""
    module.quant_state = state
    module.weight.quant_state = state


def new_state(quantized: Quantized, dtype: torch.dtype) -> QuantState:
    """A state for ``quantized`` with its scales; ``dtype`` is what the weight would be dequantized in."""
    device = quantized.codes.device
    inner = None
    if quantized.double_quant:
        table = create_dynamic_map().to(device)
        inner = QuantState(absmax=None, code=table, blocksize=SCALES_BLOCKSIZE, dtype=torch.float32)
    state = QuantState(
        absmax=None,
        shape=quantized.codes.shape,
        code=get_4bit_type(quantized.quant_type, device=device),
        blocksize=quantized.blocksize,
        quant_type=quantized.quant_type,
        dtype=dtype,
        state2=inner,
    )
    store_scales_(state, quantized)
    return state


def store_scales_(state: Any, quantized: Quantized) -> None:
    """Put the scales of ``quantized`` into ``state``, in 8 bits where that has them so: those that came with plain
    rounding as bitsandbytes stores them, others as they are."""
    exact, stored = quantized.exact_scales, quantized.stored_scales
    if exact is not None:
        if quantized.codes.numel() % state.blocksize:
            exact = torch.cat([exact[:-1], exact[-1:].clamp(min=_LEAST_OF_A_TAIL)])
        if not state.nested:
            state.absmax = exact.clone()
            return
        state.offset = exact.mean()
        state.absmax, inner = quantize_blockwise(exact - state.offset, blocksize=SCALES_BLOCKSIZE)
        state.state2.absmax = inner.absmax
        return
    state.absmax = stored.values.clone()
    if state.nested:
        assert stored.absmax is not None
        assert stored.offset is not None
        state.state2.absmax = stored.absmax.clone()
        state.offset = stored.offset.reshape(()).clone()


def packed_codes(quantized: Quantized, last: Tensor | None = None) -> Tensor:
    """The codes of ``quantized``, two a byte: flat uint8.

    Args:
        last: the byte whose low half fills an odd number of codes up; by default what bitsandbytes fills with, a zero's
            code.
    """
    packed = pack(quantized.codes, 4, first_high=True)
    if quantized.codes.numel() % 2:
        zero = torch.zeros(1, device=packed.device)
        packed[-1:] |= search_codes(zero, quantized.table()) if last is None else last & 0xF
    return packed


def stored_state(state: dict[str, Any], name: str) -> dict[str, Any]:
    """What a state dict holds of the 4-bit state of weight ``name``, by the name of the part; empty without scales."""
    found = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    return found if "absmax" in found and name in state else {}


def loaded_state(found: dict[str, Any], old: Any, device: torch.device, name: str) -> QuantState:
    """The state that a state dict holds of weight ``name``, in the format of the ``old`` one, on ``device``.

    Look-up tables that it lacks are the old ones: all weights share them, and files keep one of equal names.

    Raises:
        CodecError: it is in another format.
    """
    tables = {part: value for part, value in old.as_dict(packed=True).items() if part.endswith("quant_map")}
    new: Any = QuantState.from_dict({**tables, **found}, device=device)
    wanted, given = ((s.quant_type, s.blocksize, tuple(s.shape), bool(s.nested)) for s in (old, new))
    if wanted != given:
        raise CodecError(
            f"{name}: expected (type, blocksize, shape, double quantization) {wanted}, found {given}; load the state "
            "into a model that was quantized in the same way"
        )
    return new


def as_data(state: QuantState | None) -> dict[str, Any] | None:
    """``state`` as a dictionary of its tensors and plain values."""
    if state is None:
        return None
    return {name: as_data(value) if isinstance(value, QuantState) else value for name, value in vars(state).items()}


def as_state(data: dict[str, Any]) -> QuantState:
    """The state of which ``data`` is the copy, with tensors of its own."""
    state = QuantState.__new__(QuantState)
    for name, value in data.items():
        state.__dict__[name] = as_state(value) if isinstance(value, dict) else value
        if isinstance(value, Tensor):
            state.__dict__[name] = value.clone()
        elif isinstance(value, tuple):  # a shape, which trees of tensors take apart
            state.__dict__[name] = torch.Size(value)
    return state
