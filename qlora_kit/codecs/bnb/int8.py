"""bitsandbytes' int8 linear: row-wise scales over int8 codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear8bitLt
from torch import Tensor, nn

from ...errors import CodecError
from ...kernels.scratch import scratch
from ..base import autocast_dtype, checked_weight, described
from ..dense import DenseCodec, dense_linear, take_bias_
from ..pieces import row_pieces
from ..plain_weight import Trial, filled, holding_values, reason_against_computed
from ..quantized import Quantized, Quantizer, Scales, quantize_matrix
from ..registry import register_codec
from .common import stock_forward


@register_codec(Linear8bitLt)
class CodecInt8(DenseCodec):
    """``Linear8bitLt``: int8 codes with one scale a row, W = codes * scale / 127.

    The scales are on the weight until the first forward and on ``module.state`` after it; both are looked at.
    A module that keeps half-precision weights (``has_fp16_weights``) or isn't quantized yet is read and
    written as dense.
    """

    name = "bnb-int8"
    can_be_sharded = False  # the parameter holds the scales

    def reason_against(self, module: Any) -> str | None:
        return reason_against_computed(module) or self._reason_against_forward(module)

    def _trial(self, module: Any) -> Trial:
        linear: Any = holding_values(nn.Linear(64, 32, device="meta"))
        inputs = [filled(2, 3, 64).half(), filled(3, 64).half()]  # bitsandbytes warns that it rounds others to that
        return Trial(quantize_linear_int8(linear, linear.weight), inputs)

    def read(self, module: Any) -> Tensor:
        if not _is_int8(module):
            return super().read(module)
        codes, scales = _int8_parts(module)
        return codes.float().mul_(scales[:, None] / 127.0)

    def pieces(self, module: Any) -> Iterator[tuple[slice, Tensor]]:
        if not _is_int8(module):
            yield from super().pieces(module)
            return
        codes, scales = _int8_parts(module)
        for rows in row_pieces(codes.shape):
            yield rows, codes[rows].float().mul_(scales[rows, None] / 127.0)

    def quantizer(self, module: Any) -> Quantizer | None:
        return Quantizer("int8", None) if _is_int8(module) else None

    def quantized(self, module: Any) -> Quantized | None:
        if not _is_int8(module):
            return None
        codes, scales = _int8_parts(module)
        return Quantized("int8", codes, Scales(scales), None, None, None, True)

    @torch.no_grad()
    def take_(self, module: Any, quantized: Quantized) -> None:
        _store_int8_(module, quantized.codes.clone(), quantized.scales.clone())

    def release_(self, module: Any) -> None:
        _store_int8_(module, module.weight.data.new_empty(0), _int8_parts(module)[1])

    @torch.no_grad()
    def write_(self, module: Any, weight: Tensor) -> None:
        if _is_int8(module):
            _int8_parts(module)
            # float16 is what bitsandbytes quantizes from, so a value must be finite in it.
            weight = checked_weight(module, weight, self.shape(module), torch.float16)
            found = quantize_matrix(weight, "int8")
            _store_int8_(module, found.codes, found.scales)
        else:
            super().write_(module, weight)
            module.state.reset_grads()  # an evaluation forward caches codes

    def stored(self, module: Any) -> list[Tensor]:
        return list(_int8_parts(module)) if _is_int8(module) else super().stored(module)

    def compute_dtype(self, module: Any) -> torch.dtype:
        """The recorded compute dtype, else the bias's or dense weight's; float32 where nothing tells."""
        recorded = getattr(module, "compute_dtype", None)
        if recorded is not None:
            return recorded
        if not _is_int8(module):
            return super().compute_dtype(module)
        bias: Tensor | None = module.bias
        return torch.float32 if bias is None else bias.dtype

    def contents(self, module: Any) -> Any:
        return _int8_parts(module) if _is_int8(module) else (module.weight.data, None)

    @torch.no_grad()
    def restore_(self, module: Any, snapshot: Any) -> None:
        data, scales = snapshot
        device = module.weight.device
        if scales is not None:
            _store_int8_(module, data.to(device, copy=True), scales.to(device, copy=True))
        else:
            module.weight.data = data.to(device, copy=True)
            module.state.reset_grads()

    @torch.no_grad()
    def load_(self, module: Any, state: dict[str, Any], prefix: str) -> None:
        scales, codes = state.get(f"{prefix}SCB"), state.get(f"{prefix}weight")
        if scales is None or codes is None or not _is_int8(module):
            return
        own, own_scales = _int8_parts(module)
        if codes.shape != own.shape or codes.dtype != own.dtype or scales.numel() != own_scales.numel():
            raise CodecError(
                f"{prefix}weight: expected int8 codes {tuple(own.shape)} with {own_scales.numel()} row scales, found "
                f"{tuple(codes.shape)} {codes.dtype} with {scales.numel()}; load a state of this model"
            )
        self.restore_(module, (codes, scales.reshape(own_scales.shape)))
        for part in ("SCB", "weight_format"):
            state.pop(prefix + part, None)
        state[f"{prefix}weight"] = module.weight

    def forward(self, module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        _bring_along_(module)
        return stock_forward(module, x, x.dtype, *args, **kwargs)

    def linear_dtypes(self, module: Any, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        """In training on a CPU alone: elsewhere bitsandbytes rounds the activations too."""
        dtype = autocast_dtype(x)
        return (dtype, dtype) if _is_int8(module) and module.training and x.device.type == "cpu" else None

    def multiplier(self, module: Any, dtype: torch.dtype) -> Tensor:
        if not _is_int8(module):
            return super().multiplier(module, dtype)
        codes, scales = _int8_parts(module)
        out = scratch(tuple(codes.shape), dtype, codes.device)
        return torch.mul(codes, scales[:, None] / 127.0, out=out)

    def dense_like(self, module: Any, dtype: torch.dtype) -> nn.Module:
        return dense_linear(module, self.read(module), dtype)


def quantize_linear_int8(
    linear: nn.Linear, weight: Tensor, *, threshold: float = 0.0, compute_dtype: torch.dtype | None = None
) -> Linear8bitLt:
    """A ``Linear8bitLt`` in ``linear``'s place that holds ``weight`` (out, in) as int8, on ``linear``'s device.

    ``threshold`` is bitsandbytes' bound above which an activation column stays in half precision (0: none).

    Raises:
        CodecError: the weight doesn't fit, or has a value that overflows float16.
    """
    weight = checked_weight(linear, weight, (linear.out_features, linear.in_features), torch.float16)
    return linear_of_codes_int8(
        linear, quantize_matrix(weight, "int8"), threshold=threshold, compute_dtype=compute_dtype
    )


def linear_of_codes_int8(
    linear: nn.Linear, quantized: Quantized, *, threshold: float = 0.0, compute_dtype: torch.dtype | None = None
) -> Linear8bitLt:
    """A ``Linear8bitLt`` in ``linear``'s place that holds ``quantized``, int8, whose codes become the module's own; see
    ``quantize_linear_int8``."""
    module = Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        has_fp16_weights=False,
        threshold=threshold,
        device="meta",
    )
    codes, scales = quantized.codes, quantized.scales
    module.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    module.compute_dtype = compute_dtype or linear.weight.dtype  # type: ignore[assignment]
    take_bias_(module, linear)
    return module


def _is_int8(module: Any) -> bool:
    return module.weight.dtype == torch.int8


def _int8_scales(module: Any) -> Tensor | None:
    scales = getattr(module.weight, "SCB", None)
    return module.state.SCB if scales is None else scales


def _int8_parts(module: Any) -> tuple[Tensor, Tensor]:
    """Codes and float32 row scales, on the weight's device."""
    scales = _int8_scales(module)
    if scales is None:
        raise CodecError(
            f"{described(module)}: expected row scales in weight.SCB or state.SCB, found neither beside int8 codes; "
            "load the checkpoint with its SCB entries, or quantize by moving a half-precision module to its device; "
            "under fully_shard name these weights in ignored_params, as qlora_kit.distributed.prepare does"
        )
    codes: Tensor = module.weight.data
    return codes, scales.to(device=codes.device, dtype=torch.float32)


def _bring_along_(module: Any) -> None:
    """Codes and scales to where the weight is: bitsandbytes leaves its second hold on them behind where a model around
    the module is moved to another device."""
    weight = module.weight
    device = weight.device
    for holder in (weight, module.state):
        codes = holder.CB
        if codes is not None and codes.device != device:
            holder.CB, holder.SCB = weight.data, holder.SCB.to(device)


def _store_int8_(module: Any, codes: Tensor, scales: Tensor) -> None:
    """Put codes and scales wherever the module keeps them, before or after its first forward."""
    module.weight.data = codes
    for holder in (module.weight, module.state):
        if holder.CB is not None:
            holder.CB = module.weight.data
        if holder.SCB is not None:
            holder.SCB = scales
