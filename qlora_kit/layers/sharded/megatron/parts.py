"""Rows of a fused linear as linears of their own: q, k and v of ``linear_qkv``, gate and up of ``linear_fc1``.

Megatron computes several projections in one product. One adapter on that (r columns for all of them) is the fast way;
adapters on each ("canonical" ones) are what other libraries train, and what their files hold. Here the second is the
first with the branch said by rows: ``FusedLinear`` stands in for the fused linear, computes its product once, and adds
each part's branch to the part's rows. A part is a module to everyone else, with a path, a codec that reads and writes
its rows, and a layer family, so ranks, alphas, files, merges and the rest are as anywhere. Names are those of Megatron
Bridge's canonical adapters, under the fused linear: ``linear_qkv.linear_q``, ``linear_fc1.linear_fc1_gate``.

How rows lie: ``linear_qkv`` has a block for each group of queries, its heads of q, then one head of k and one of v, and
each rank has some of the groups; ``linear_fc1`` has gate, then up, and each rank some of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ....codecs import Codec, codec_for
from ....codecs.base import checked_weight
from ....codecs.quantized import Quantized, Quantizer, Scales
from ....errors import AdapterError, CodecError, TargetError
from ....naming import StandIn, every_module
from ...weight_in_effect import Branch, Sum, weight_in_effect
from ..sharding import Sharding, sharding_of
from .linear import MegatronLinear, called

#: Names of parts by the child that holds them.
PARTS = {"linear_qkv": ("linear_q", "linear_k", "linear_v"), "linear_fc1": ("linear_fc1_gate", "linear_fc1_up")}
NAMES = frozenset(name for names in PARTS.values() for name in names)


def rows_of_parts(parent: Any, child: str) -> dict[str, Tensor]:
    """Which of this rank's rows of ``child``, a fused linear of ``parent``, belong to which part; empty if it isn't
    one.

    Raises:
        TargetError: they lie in a way that isn't known.
    """
    fused = parent._modules.get(child)
    if fused is None or not hasattr(parent, "config"):
        return {}
    if child == "linear_fc1":
        if not parent.config.gated_linear_unit:
            return {}
        count = codec_for(_base(fused)).shape(_base(fused))[0]
        gate, up = torch.arange(count).chunk(2)
        return {"linear_fc1_gate": gate, "linear_fc1_up": up}
    groups, heads = parent.num_query_groups_per_partition, parent.num_attention_heads_per_partition
    if getattr(parent.config, "attention_output_gate", False) or parent.config.num_query_groups < parent.world_size:
        raise TargetError(
            f"{child}: expected rows of whole groups of q, k and v on each rank, found an output gate among them or "
            "fewer groups than ranks; adapt the fused linear instead"
        )
    width, per_group = parent.hidden_size_per_attention_head, heads // groups
    rows = torch.arange(groups * (per_group + 2) * width).view(groups, -1)
    parts = rows.split([per_group * width, width, width], dim=1)
    return {name: part.reshape(-1) for name, part in zip(PARTS["linear_qkv"], parts, strict=True)}


def _base(module: nn.Module) -> Any:
    return module.base_layer if isinstance(module, FusedLinear) else module


class FusedPart(nn.Module):
    """Some rows of ``fused``, which keeps them; no parameter of its own."""

    def __init__(self, fused: nn.Module, rows: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "fused", fused)  # its child is it elsewhere
        self.rows = rows
        self.bias = None
        self.training = fused.training

    fused: Any

    @property
    def weight(self) -> Tensor:
        """The fused linear's, for its dtype and device; where it isn't quantized, the rows of it."""
        weight: Tensor = self.fused.weight
        return weight[self.rows] if weight.is_floating_point() and weight.dim() == 2 else weight

    def forward(self, x: Tensor) -> Tensor:
        return called(self.fused, x).out.index_select(-1, self.rows.to(x.device))


class FusedLinear(StandIn):
    """``base_layer`` in one product, and beside it what adapters of its parts add to their rows."""

    holds = "base_layer"

    def __init__(self, fused: nn.Module, parts: dict[str, Tensor]) -> None:
        super().__init__()
        self.base_layer = fused
        self.parts = tuple(parts)
        for name, rows in parts.items():
            self.add_module(name, FusedPart(fused, rows))
        self.training = fused.training

    def adapters(self) -> Iterator[MegatronLinear]:
        """Those of its parts that have one."""
        parts: Any = (self._modules[name] for name in self.parts)
        return (part for part in parts if isinstance(part, MegatronLinear))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for part in self.adapters():
            part.refuse_rows(kwargs)
        adding = [(part, names) for part in self.adapters() if (names := part._in_effect)]
        if not adding:
            return self.base_layer(x, *args, **kwargs)
        found = called(self.base_layer, x, *args, **kwargs)
        out = found.out
        for part, names in adding:
            rows = part.base_layer.rows.to(out.device)
            for name in names:
                out = out.index_add(-1, rows, part.branch(found.multiplied, name).to(out.dtype))
        return found.again(out)

    @property
    def weight(self) -> Tensor:
        """What its product and its parts' branches compute with, for who reads it instead of calling; see
        ``layers.weight_in_effect``."""
        base: Any = self.base_layer
        branches = [self._on_all_rows(part, name) for part in self.adapters() for name in part._in_effect]
        return weight_in_effect(Sum(codec_for(base), base, base.weight, branches, _refuse_scaling))

    def _on_all_rows(self, part: MegatronLinear, name: str) -> Branch:
        """A part's branch as one on all rows, with zeros at those of others."""
        A, B, scaling = part.weight_branch(name)
        rows = part.base_layer.rows.to(B.device)
        count = codec_for(self.base_layer).shape(self.base_layer)[0]
        return A, B.new_zeros(count, B.shape[1]).index_copy(0, rows, B), scaling

    def __getattr__(self, attribute: str) -> Any:
        """Attributes that model code reads off the fused linear."""
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "base_layer" or attribute.startswith("_"):
                raise
            return getattr(self.base_layer, attribute)


def _refuse_scaling(factor: float) -> None:
    raise AdapterError(
        f"weight.mul_({factor}): expected a fused linear without adapters on its parts to multiply, found some; "
        "unload() first"
    )


def close_parts_(model: nn.Module) -> None:
    """Put fused linears back whose parts have no adapter any more."""
    for module in every_module(model):
        for name, child in list(module._modules.items()):
            if isinstance(child, FusedLinear) and not any(True for _ in child.adapters()):
                module._modules[name] = child.base_layer


def sharding_of_part(part: FusedPart) -> Sharding | None:
    """As the fused linear's, of these rows of each rank's."""
    whole = sharding_of(part.fused)
    if whole is None:
        return None
    return replace(whole, shape=(len(part.rows) * whole.size, whole.shape[1]), pieces=1)


class FusedPartCodec(Codec):
    """``FusedPart``: rows of what the fused linear's own codec reads and writes."""

    name = "rows"

    def shape(self, module: Any) -> tuple[int, int]:
        return len(module.rows), codec_for(module.fused).shape(module.fused)[1]

    def read(self, module: Any) -> Tensor:
        whole = codec_for(module.fused).read(module.fused)
        return whole[module.rows.to(whole.device)]

    @torch.no_grad()
    def write_(self, module: Any, weight: Tensor) -> None:
        if (own := self.quantizer(module)) is not None:
            self.restore_(module, _rows_as_stored(own(weight), slice(None)))
            return
        weight = checked_weight(module.fused, weight, self.shape(module), module.fused.weight.dtype)
        module.fused.weight[module.rows.to(weight.device)] = weight.to(module.fused.weight.dtype)

    def quantizer(self, module: Any) -> Quantizer | None:
        return codec_for(module.fused).quantizer(module.fused)

    def quantized(self, module: Any) -> Quantized | None:
        whole = codec_for(module.fused).quantized(module.fused)
        if whole is None:
            return None
        codes, scales, shifts = _rows_as_stored(whole, module.rows.to(whole.codes.device))
        return replace(
            whole,
            codes=codes,
            stored_scales=Scales(scales.reshape(-1)),
            stored_shifts=None if shifts is None else Scales(shifts.reshape(-1)),
        )

    def take_(self, module: Any, quantized: Quantized) -> None:
        self.restore_(module, _rows_as_stored(quantized, slice(None)))

    def stored(self, module: Any) -> list[Tensor]:
        found = self.contents(module)
        return [found] if isinstance(found, Tensor) else [part for part in found if part is not None]

    def compute_dtype(self, module: Any) -> torch.dtype:
        return codec_for(module.fused).compute_dtype(module.fused)

    def device(self, module: Any) -> torch.device:
        return codec_for(module.fused).device(module.fused)

    def contents(self, module: Any) -> Any:
        whole = codec_for(module.fused).quantized(module.fused)
        if whole is None:
            return module.fused.weight.detach()[module.rows.to(module.fused.weight.device)]
        return _rows_as_stored(whole, module.rows.to(whole.codes.device))

    @torch.no_grad()
    def restore_(self, module: Any, snapshot: Any) -> None:
        codec, fused = codec_for(module.fused), module.fused
        if isinstance(snapshot, Tensor):
            fused.weight[module.rows.to(snapshot.device)] = snapshot
            return
        whole: Any = codec.quantized(fused)
        rows = module.rows.to(whole.codes.device)
        new = [None if part is None else part.clone() for part in _rows_as_stored(whole, slice(None))]
        for part, values in zip(new, snapshot, strict=True):
            if part is not None:
                part[rows] = values
        codes, scales, shifts = new
        changed = replace(
            whole,
            codes=codes,
            stored_scales=Scales(scales.reshape(-1)),  # type: ignore[union-attr]
            stored_shifts=None if shifts is None else Scales(shifts.reshape(-1)),
        )
        codec.take_(fused, changed)

    def housed(self, module: nn.Module, linear: nn.Module) -> nn.Module:
        raise CodecError(
            "expected a linear layer that keeps its weight by itself to be stored in few bits, found rows of a fused "
            "one; quantize_ the model first and start these adapters otherwise, or start one on the fused linear"
        )


def _rows_as_stored(quantized: Quantized, rows: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (rows, in), and scales and shifts (rows, blocks of a row), of some rows.

    Raises:
        CodecError: blocks or scales of scales go across rows.
    """
    height, width = quantized.codes.shape
    scales, shifts = quantized.stored_scales, quantized.stored_shifts
    if scales.absmax is not None or (quantized.blocksize is not None and width % quantized.blocksize):
        raise CodecError(
            f"a part of a fused linear: expected scales of each row's own, found blocks of {quantized.blocksize} in "
            f"rows of {width}, or scales in 8 bits; quantize with double_quant=False and a blocksize that divides the "
            "rows, or adapt the fused linear"
        )
    return (
        quantized.codes[rows],
        scales.values.view(height, -1)[rows],
        None if shifts is None else shifts.values.view(height, -1)[rows],
    )
