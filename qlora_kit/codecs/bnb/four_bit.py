"""bitsandbytes' 4-bit linear.

4-bit storage is two codes a byte (the first value in the high nibble), one scale per ``blocksize`` values in
row-major order, and optionally those scales quantized themselves (double quantization). Weights are read
here by table look-up in float32 and never through ``dequantize_4bit``, for three reasons seen on the stock
build, each held by a test:

- on CPU it takes the wrong scales when in_features isn't a multiple of the blocksize; the forward and the
  backward of ``Linear4bit`` share the fault, so ``protect_`` gives such modules a forward of their own;
- it rounds to the dtype recorded at quantization, often bfloat16;
- on CPUs with AVX512_BF16 an evaluation forward permutes the codes and rounds the scales to bfloat16 in
  place, after which it returns garbage. ``protect_`` turns that off and undoes it.

The stock forward also casts ``bias.data`` to the compute dtype for good; ours casts a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from math import lcm
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn

from ...errors import CodecError
from ...kernels.scratch import gathered
from .. import blockwise
from ..base import checked_weight, described
from ..dense import DenseCodec, dense_linear, take_bias_
from ..lookup import lookup_linear
from ..pieces import assembled, row_pieces
from ..plain_weight import Trial, filled, holding_values, reason_against_computed
from ..quantized import BNB_BLOCKSIZES, Quantized, Quantizer, Scales, quantize_matrix
from ..registry import codec_for, register_codec
from .common import stock_forward
from .kernel import KERNEL_DTYPES, kernel_is_right, kernel_pieces, misread
from .layout import is_repacked, scales_of, standard_bytes
from .quant_state import (
    adopt_,
    as_data,
    as_state,
    loaded_state,
    new_state,
    packed_codes,
    state_of,
    store_scales_,
    stored_state,
)


@register_codec(Linear4bit)
class Codec4bit(DenseCodec):
    """``Linear4bit``: NF4 or FP4, any blocksize, double quantization or not, every ``quant_storage``.

    A module that isn't quantized yet (created on the CPU and not moved) is read and written as dense.
    """

    name = "bnb-4bit"

    def reason_against(self, module: Any) -> str | None:
        return reason_against_computed(module) or self._reason_against_forward(module)

    def _trial(self, module: Any) -> Trial:
        linear: Any = holding_values(nn.Linear(64, 32, device="meta"))
        return Trial(quantize_linear(linear, linear.weight), [filled(2, 3, 64), filled(3, 64)])

    def read(self, module: Any) -> Tensor:
        if state_of(module) is None:
            return super().read(module)
        return assembled(self.pieces(module), self.shape(module), module.weight.device)

    def pieces(self, module: Any) -> Iterator[tuple[slice, Tensor]]:
        state = state_of(module)
        if state is None:
            yield from super().pieces(module)
            return
        table = state.code.float()
        byte = torch.arange(256, device=table.device)
        pairs = torch.stack([table[byte >> 4], table[byte & 0xF]], dim=1)  # both values of each byte at once
        stored, scales, blocksize = standard_bytes(module.weight.data, state), scales_of(state), state.blocksize
        for rows in row_pieces(state.shape, lcm(blocksize, 2)):
            begin, end = rows.start * module.in_features, rows.stop * module.in_features
            values = pairs.index_select(0, stored[begin // 2 : -(-end // 2)].int()).reshape(-1)[: end - begin]
            values = blockwise.scale_blocks_(values, scales[begin // blocksize : -(-end // blocksize)], blocksize)
            yield rows, values.view(-1, module.in_features)

    def quantizer(self, module: Any) -> Quantizer | None:
        state = state_of(module)
        return None if state is None else Quantizer(state.quant_type, state.blocksize, state.nested)

    def quantized(self, module: Any) -> Quantized | None:
        state: Any = state_of(module)
        if state is None:
            return None
        pairs = standard_bytes(module.weight.data, state)
        codes = torch.stack([pairs >> 4, pairs & 0xF], dim=1).reshape(-1)[: state.shape.numel()].view(state.shape)
        scales = Scales(state.absmax, state.state2.absmax, state.offset.reshape(1)) if state.nested else None
        return Quantized(state.quant_type, codes, scales or Scales(scales_of(state)), None, state.blocksize, None)

    @torch.no_grad()
    def take_(self, module: Any, quantized: Quantized) -> None:
        self.protect_(module)
        take_codes_(module, quantized)

    @torch.no_grad()
    def write_(self, module: Any, weight: Tensor) -> None:
        state = state_of(module)
        if state is None:
            super().write_(module, weight)
            return
        weight = checked_weight(module, weight, self.shape(module), torch.float32).float()
        self.protect_(module)
        take_codes_(module, quantize_matrix(weight, state.quant_type, state.blocksize, double_quant=state.nested))

    def release_(self, module: Any) -> None:
        super().release_(module)
        if (state := state_of(module)) is not None:
            state.absmax = state.absmax.new_empty(0)

    def stored(self, module: Any) -> list[Tensor]:
        """The codes row by row and all scales; the small look-up tables aren't among them."""
        state = state_of(module)
        if state is None:
            return super().stored(module)
        codes = standard_bytes(module.weight.data, state)
        if is_repacked(state):
            return [codes, scales_of(state)]
        scales = [state.absmax.reshape(-1)]
        return [codes, *scales, *([state.state2.absmax, state.offset.reshape(1)] if state.nested else [])]

    def compute_dtype(self, module: Any) -> torch.dtype:
        if module.compute_dtype is not None:
            return module.compute_dtype
        state = state_of(module)
        if state is not None:
            return state.original_dtype if is_repacked(state) else state.dtype
        weight: Tensor = module.weight
        return weight.dtype if weight.is_floating_point() else torch.float32

    def contents(self, module: Any) -> Any:
        return module.weight.data, as_data(state_of(module))

    @torch.no_grad()
    def restore_(self, module: Any, snapshot: Any) -> None:
        data, saved = snapshot
        device = module.weight.device
        module.weight.data = data.to(device, copy=True)
        state = state_of(module)
        if state is not None and saved is not None:
            # The same state object lives on, since the weight, the module and others may hold it.
            state.__dict__.clear()
            state.__dict__.update(as_state(saved).__dict__)
            state.to(device)
            adopt_(module, state)

    @torch.no_grad()
    def load_(self, module: Any, state: dict[str, Any], prefix: str) -> None:
        found, old = stored_state(state, f"{prefix}weight"), state_of(module)
        if not found or old is None:
            return
        self.protect_(module)
        new = loaded_state(found, old, module.weight.device, f"{prefix}weight")
        codes = state[f"{prefix}weight"]
        if codes.shape != module.weight.shape or codes.dtype != module.weight.dtype:
            raise CodecError(
                f"{prefix}weight: expected packed codes {tuple(module.weight.shape)} {module.weight.dtype}, found "
                f"{tuple(codes.shape)} {codes.dtype}; load a state of this model"
            )
        self.restore_(module, (codes, as_data(new)))
        for part in found:
            del state[f"{prefix}weight.{part}"]
        state[f"{prefix}weight"] = module.weight

    @torch.no_grad()
    def protect_(self, module: Any) -> None:
        """Never let an evaluation forward rewrite the weight, and undo it where one already has; where the
        stock kernels are wrong, compute by look-up, whether an adapter stands on the module or not.

        The codes come back exactly. The scales were rounded to bfloat16 and stay so, in float32 and no longer
        doubly quantized, which loses nothing more; a UserWarning says it once.
        """
        module.support_avx512bf16_for_cpu = False
        state = state_of(module)
        if state is None:
            return
        if misread(module, state) and "forward" not in module.__dict__ and not self._reason_against_forward(module):
            module.forward = partial(_lookup_forward, module)
        if not is_repacked(state):
            return
        weight: Params4bit = module.weight
        shape, storage = state.original_qshape, getattr(state, "original_storage_type", torch.uint8)
        weight.data = standard_bytes(weight.data, state).reshape(shape).view(storage)
        state.absmax, state.dtype = scales_of(state), state.original_dtype
        state.nested, state.offset, state.state2 = False, None, None
        state.packing_format_for_cpu = False  # type: ignore[attr-defined]  # set by the stock repacking
        weight.compress_statistics = False
        adopt_(module, state)
        warnings.warn(
            f"{described(module)}: an earlier evaluation forward had repacked this 4-bit weight for CPU inference "
            "and rounded its scales to bfloat16 (up to 0.4 % each); the codes are restored, that rounding can't be "
            "undone. Load the model again and call prepare_model_for_kbit_training or apply_lora before the first "
            "forward to avoid it.",
            UserWarning,
            stacklevel=2,
        )

    def shield_(self, module: Any) -> Any:
        weight: Tensor = module.weight
        if state_of(module) is None or not weight.is_floating_point():
            return None
        storage = weight.dtype
        weight.data = weight.data.view(torch.uint8)
        return storage

    def unshield_(self, module: Any, token: Any) -> None:
        module.weight.data = module.weight.data.view(token)

    def forward(self, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        state = state_of(module)
        if state is None:
            raise CodecError(
                f"{described(module)}.weight: expected a quantized weight, found {module.weight.dtype} not yet "
                "quantized; move the model to its device first, e.g. model.to('cpu') or model.to('cuda')"
            )
        misreads = x.device.type == "cpu" and misread(module, state)  # of the state at hand: it is asked at each call
        if module.support_avx512bf16_for_cpu or is_repacked(state) or misreads:
            self.protect_(module)
        if not module.compute_type_is_set:  # bitsandbytes settles it at the first forward, from the input
            module.set_compute_type(x)
            module.compute_type_is_set = True
        return stock_forward(module, x, module.compute_dtype or x.dtype, *args, **kwargs)

    def linear_dtypes(self, module: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        if state_of(module) is None or (x.dtype == torch.float64 and module.compute_dtype not in (None, x.dtype)):
            return None
        return module.compute_dtype or x.dtype, x.dtype

    def multiplier(self, module: Any, dtype: torch.dtype) -> Tensor:
        state: Any = state_of(module)
        if state is None:
            return super().multiplier(module, dtype)
        ours = dtype not in KERNEL_DTYPES or is_repacked(state) or not kernel_is_right(module, module.weight)
        pieces = self.pieces(module) if ours else kernel_pieces(module.weight.data, state, dtype)
        return gathered(pieces, tuple(state.shape), dtype, module.weight.device)

    def dense_like(self, module: Any, dtype: torch.dtype) -> nn.Module:
        return dense_linear(module, self.read(module), dtype)


def _lookup_forward(module: Any, x: Tensor) -> Tensor:
    """``module.forward`` where a row isn't a whole number of blocks: the stock one wherever that is right."""
    if kernel_is_right(module, x):
        return type(module).forward(module, x)
    return lookup_linear(module, codec_for(module), x, module.compute_dtype or x.dtype)


def quantize_linear(
    linear: nn.Linear,
    weight: Tensor,
    *,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> Linear4bit:
    """A protected ``Linear4bit`` in ``linear``'s place that holds ``weight``, on ``linear``'s device.

    Args:
        weight: (out, in), finite; quantized from float32.

    For the other arguments and errors see ``linear_of_codes``.
    """
    weight = checked_weight(linear, weight, (linear.out_features, linear.in_features), torch.float32).float()
    quantized = quantize_matrix(weight, quant_type, blocksize, double_quant=double_quant)
    return linear_of_codes(linear, quantized, compute_dtype=compute_dtype, quant_storage=quant_storage)


def linear_of_codes(
    linear: nn.Linear,
    quantized: Quantized,
    *,
    compute_dtype: torch.dtype | None = None,
    quant_storage: torch.dtype = torch.uint8,
) -> Linear4bit:
    """A protected ``Linear4bit`` in ``linear``'s place that holds ``quantized``, on its device.

    Args:
        linear: gives the sizes, a copy of the bias and the training flag.
        compute_dtype: the products' dtype; None takes ``linear``'s.
        quant_storage: the dtype that the bytes call themselves.

    Raises:
        CodecError: bitsandbytes doesn't know the quantization type or blocksize.
    """
    kind, blocksize, nested = quantized.quant_type, quantized.blocksize, quantized.double_quant
    if kind not in ("nf4", "fp4") or blocksize not in BNB_BLOCKSIZES:
        raise CodecError(
            f"{described(linear)}: expected nf4 or fp4 in blocks of one of {list(BNB_BLOCKSIZES)} for Linear4bit, "
            f"found {kind} in blocks of {blocksize}; pick one of these, or pack the codes (qlora_kit.codecs.packed)"
        )
    dtype = compute_dtype or linear.weight.dtype
    module = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=dtype,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=quant_storage,
        device="meta",
    )
    state = new_state(quantized, dtype)
    module.weight = Params4bit(
        packed_codes(quantized).view(quant_storage).unsqueeze(1),
        requires_grad=False,
        quant_state=state,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=quant_storage,
        bnb_quantized=True,  # and of no ``module``, as after a move: that would keep both until garbage is collected
    )
    adopt_(module, state)
    take_bias_(module, linear)
    Codec4bit().protect_(module)
    return module


@torch.no_grad()
def take_codes_(module: Linear4bit, quantized: Quantized) -> None:
    """Put the codes and scales of ``quantized``, of the module's type and blocksize, in the place of the module's."""
    state: Any = state_of(module)
    weight: Any = module.weight
    last = weight.data.view(torch.uint8).view(-1)[-1]  # what fills it up stays
    weight.data = packed_codes(quantized, last).view(weight.dtype).view(weight.shape)
    store_scales_(state, quantized)
    adopt_(module, state)
