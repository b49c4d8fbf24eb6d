"""Layers that compute with the weight as it will be after merging, so that a merge keeps what was trained.

Rounding to few bits swallows deltas smaller than half a step, and at 2 or 3 bits most are. A *merge-aware* layer trains
through that rounding. With Q the base's weight and round the storage's own rounding, it computes

    y = x W_m^T + b,     W_m = round(Q + sum over active adapters of  s * B A),

and passes gradients straight through the rounding, dL/d(s B A) = dL/dW_m (Bengio et al. 2013, arXiv 1308.3432), while
the input's gradient is that of what was computed, dL/dy W_m. With G = dL/dy that makes dL/dB = s G^T (x A^T) and
dL/dA = s (G B)^T x: to the letter what they are without rounding. So only two things differ from an ordinary layer: the
weight that is multiplied with holds the adapters already, and their own products are needed for gradients alone.

The weight is kept as the very module that the merge leaves, a linear layer of the target's storage: what is computed
before the merge and after it is one function of the same bits. It is rounded anew when a factor has changed, and kept
until then: a backward pass, a checkpointed block that is computed again, further batches before the optimizer's step
and evaluation find it there. That costs the merged model's memory beside the base's. It is never written to, only
replaced, so a backward pass has the weight of its own forward whatever happens in between.

Whether factors have changed, their values say: optimizers that write through ``data`` or by kernels of their own,
and sharded training, leave no trace in torch's version counters. Where these do tell of a change, nothing is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec, codec_for
from ..codecs.autocast import without_autocast
from ..codecs.quantized import Quantized, Quantizer
from ..codecs.shards.tensors import is_partitioned
from ..errors import AdapterError
from .row_choice import left_to_python, rows_of


@dataclass(frozen=True)
class Rounding:
    """What a merge does to a layer's weight.

    Attributes:
        quantizer: how it rounds.
        hold: (base, quantized) -> the module of the result in the base's place.
    """

    quantizer: Quantizer
    hold: Callable[[nn.Module, Quantized], nn.Module]


@dataclass(frozen=True)
class Merged:
    """A module that holds a merged weight, and how."""

    module: Any
    codec: Codec


@dataclass(frozen=True)
class _Factor:
    """A tensor at some moment: itself, a copy of its values, and how often it had been written to."""

    tensor: Tensor
    values: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Factor:
        return cls(tensor, tensor.detach().clone(), _version(tensor))

    def is_still(self, tensor: Tensor) -> bool:
        if tensor is self.tensor and _version(tensor) != self.version:
            return False
        own = self.values
        return own.shape == tensor.shape and own.dtype == tensor.dtype and torch.equal(own, tensor.detach())


@dataclass(frozen=True)
class _Kept:
    """A merged weight and what it was made of. ``stored`` shares the base's memory, so that no other can have its
    address."""

    merged: Merged
    rounding: Rounding
    weight: Tensor
    stored: Tensor
    version: int
    scaling: tuple[float, ...]
    factors: tuple[_Factor, ...]

    def is_of(self, rounding: Rounding, weight: Tensor, scaling: tuple[float, ...], factors: Sequence[Tensor]) -> bool:
        same = rounding == self.rounding and weight is self.weight and scaling == self.scaling
        same = same and weight.data_ptr() == self.stored.data_ptr() and _version(weight) == self.version
        same = same and weight.device == self.stored.device and len(factors) == len(self.factors)
        return same and all(own.is_still(tensor) for own, tensor in zip(self.factors, factors, strict=True))


class MergeAwareLayer:
    """Of adapter layers: the weight as it will be after merging, computed with before."""

    # What an adapter layer has; see there.
    base_layer: Any
    codec: Codec
    r: dict[str, int]
    scaling: dict[str, float]
    adapter_tensors: Any
    stacked: Any
    #: What a merge does to this layer's weight, by the adapters that are trained for one.
    merge_aware: dict[str, Rounding]
    #: False: compute as without ``merge_aware``.
    computes_as_merged: bool
    _kept: _Kept | None

    def rounding_of(self, names: Sequence[str]) -> Rounding | None:
        """How a merge of the adapters ``names`` rounds, if one of them is trained for it.

        Raises:
            AdapterError: they are trained for different ones.
        """
        found = {name: self.merge_aware[name] for name in names if name in self.merge_aware}
        roundings = list(dict.fromkeys(found.values()))
        if len(roundings) > 1:
            raise AdapterError(
                f"adapters {list(found)}: expected at most one kind of merge that active adapters are trained for "
                f"(merge_aware), found {[each.quantizer for each in roundings]}; activate one of them, or call "
                "set_merge_aware(False)"
            )
        return roundings[0] if roundings else None

    def as_merged(self, names: Sequence[str]) -> Merged | None:
        """What this layer computes with while ``names`` are in effect, if that is what a merge would leave: not where
        rows have adapters of their own, whose weights no merge puts into one."""
        rounding = self.rounding_in_effect(names)
        return None if rounding is None else self.merged_by(rounding, names)

    def rounding_in_effect(self, names: Sequence[str]) -> Rounding | None:
        """The rounding that ``as_merged`` computes with, if any."""
        if not self.merge_aware or not self.computes_as_merged or rows_of(self) is not None:
            return None
        return self.rounding_of(names)

    @left_to_python
    @torch.no_grad()
    def merged_by(self, rounding: Rounding, names: Sequence[str]) -> Merged:
        """The base and the adapters ``names``, rounded by ``rounding``; from memory if nothing has changed.

        Raises:
            AdapterError: the base's weight isn't in memory, or is trained.
        """
        base, weight = self.base_layer, self.base_layer.weight
        held = [name for name in names if name in self.r]
        factors = [tensor for name in held for tensor in self.adapter_tensors(name).values()]
        scaling = tuple(self.scaling[name] for name in held)
        kept = self._kept
        if kept is None or not kept.is_of(rounding, weight, scaling, factors):
            _check_can_be_rounded(base, weight, factors)
            self._kept = None  # its memory first
            with torch.inference_mode(False), torch.no_grad(), without_autocast(weight.device):  # training may follow
                found = rounding.quantizer(self.codec.plus(base, *self.stacked(dict.fromkeys(held, 1.0))))
                module = rounding.hold(base, found)
                made = tuple(map(_Factor.of, factors))
            merged = Merged(module, codec_for(module))
            kept = _Kept(merged, rounding, weight, weight.detach(), _version(weight), scaling, made)
            self._kept = kept
        module = kept.merged.module
        module.training = base.training
        module._parameters["bias"] = base._parameters.get("bias")  # which may be trained
        return kept.merged

    def rounded_weight(self, rounding: Rounding, names: Sequence[str]) -> Tensor:
        """What ``merged_by`` reads as: a new float32 (out, in) tensor."""
        merged = self.merged_by(rounding, names)
        return merged.codec.read(merged.module)

    def forget_merged_(self) -> None:
        """Let go of the rounded weight."""
        self._kept = None


def for_gradients(branch: Tensor) -> Tensor:
    """Zeros through which gradients reach what ``branch`` was computed from, as if they were it."""
    return branch - branch.detach()


def _check_can_be_rounded(base: nn.Module, weight: Tensor, factors: Sequence[Tensor]) -> None:
    if is_partitioned(weight):
        raise AdapterError(
            f"{type(base).__name__}.weight: expected a whole weight to round it with merge_aware, found one that "
            "DeepSpeed's ZeRO-3 has sharded; take ZeRO-2, FSDP2 or DDP, or call set_merge_aware(False)"
        )
    if weight.is_meta and not factors[0].is_meta:
        raise AdapterError(
            f"{type(base).__name__}.weight: expected a weight in memory to round it with merge_aware, found one on the "
            "meta device (offloaded); load the model without offloading, or call set_merge_aware(False)"
        )
    if weight.requires_grad:
        raise AdapterError(
            f"{type(base).__name__}.weight: expected a frozen weight under a merge-aware adapter, found one that is "
            "trained, and its gradient would be lost; freeze it, or call set_merge_aware(False)"
        )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
