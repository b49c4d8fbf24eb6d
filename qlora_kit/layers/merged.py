"""What is merged into a layer's base weight, and the way back: written once, for every family and every storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..codecs import Codec
from ..codecs.finite import all_finite
from ..errors import MergeError


class MergedLayer:
    """Of adapter layers: deltas added to the base weight, and taken out again bit for bit."""

    # What an adapter layer has; see there.
    base_layer: Any
    codec: Codec
    r: dict[str, int]
    scaling: dict[str, float]
    merged_adapters: list[str]
    shares_weight: bool
    factors: Any
    rounding_of: Any
    rounded_weight: Any
    forget_merged_: Any
    _shared: tuple[nn.Parameter, ...]
    _unmerged: Any

    def stacked(self, weights: Mapping[str, float]) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank) in float32 with B @ A the sum of ``weights[name]`` times each delta; the
        rank is that of all of them together. A alone may be the adapter's own memory."""
        parts = [(*self.factors(name), weights[name] * self.scaling[name]) for name in weights if name in self.r]
        As, Bs = [A.detach().float() for A, _, _ in parts], [B.detach().float() * scale for _, B, scale in parts]
        return (As[0], Bs[0]) if len(parts) == 1 else (torch.cat(As), torch.cat(Bs, dim=1))

    @torch.no_grad()
    def merged_weight(self, names: Sequence[str]) -> Tensor:
        """The base weight without anything merged, plus the deltas of ``names``: float32 (out, in)."""
        held = {name: 1.0 for name in names if name in self.r}
        with self.unmerged():
            if not held:
                return self.codec.read(self.base_layer)
            return self.codec.plus(self.base_layer, *self.stacked(held))

    @torch.no_grad()
    def merge_(self, names: Sequence[str], *, safe: bool = False) -> None:
        """Add the deltas of ``names`` to the base weight: one read, one write, whatever their number.

        With ``safe`` a result that isn't finite is refused. The weight from before is kept, so ``unmerge_``
        gives it back bit for bit, quantized or not. Adapters that are trained for a merge (``merge_aware``) give what
        that leaves.

        Raises:
            MergeError: not finite; or the merge that they are trained for is into other few bits than the weight has.
        """
        names = [n for n in dict.fromkeys([*self.merged_adapters, *names]) if n in self.r]
        if names == self.merged_adapters:
            return
        weight = self._weight_to_merge(names)
        if safe and not all_finite(weight):
            raise MergeError(f"merging {names} gives a weight with NaN or infinite values; the weight is unchanged")
        self._write_merged_(names, weight)

    def _weight_to_merge(self, names: Sequence[str]) -> Tensor:
        """What is to be stored for ``names``, float32 (out, in), where the storage rounds it if it has few bits."""
        rounding, own = self.rounding_of(names), self.codec.quantizer(self.base_layer)
        if rounding is None or rounding.quantizer == own:
            return self.merged_weight(names)
        if own is not None:
            raise MergeError(
                f"expected adapters that are trained to be merged into {own}, as the weight is stored, found {names} "
                f"trained for {rounding.quantizer}; merge_and_unload() stores them so"
            )
        with self.unmerged():
            return self.rounded_weight(rounding, names)

    def _write_merged_(self, names: Sequence[str], weight: Tensor) -> None:
        """Store ``weight``, which is that of ``names``, as the base's; on any error it is as it was."""
        self.forget_merged_()
        shared = self._shared
        self._separate_()
        try:
            before = self.codec.exchange_(self.base_layer, weight)
        except BaseException:
            if self._shared and not shared:
                self.unmerge_()
            raise
        if self._unmerged is None:
            self._unmerged = before
        self.merged_adapters = list(names)

    def way_back(self) -> Callable[[], None]:
        """A call that puts the base weight, and what is merged into it, back as they are now, bit for bit."""
        if self._unmerged is None:
            return self.unmerge_
        merged, unmerged, names = self.codec.snapshot(self.base_layer), self._unmerged, self.merged_adapters

        def undo() -> None:
            self._separate_()
            self.codec.restore_(self.base_layer, merged)
            self._unmerged, self.merged_adapters = unmerged, names

        return undo

    @torch.no_grad()
    def unmerge_(self) -> None:
        """Put the base weight back as it was before ``merge_``, bit for bit."""
        self.forget_merged_()
        if self._shared:
            (self.base_layer.weight,) = self._shared
        elif self._unmerged is not None:
            self.codec.restore_(self.base_layer, self._unmerged)
        self._unmerged, self.merged_adapters, self._shared = None, [], ()

    def _separate_(self) -> None:
        """Where another module holds the base's weight too, give the base one of its own: merges are this layer's."""
        if self.shares_weight and not self._shared:
            shared = self.base_layer.weight
            self._shared = (shared,)
            self.base_layer.weight = nn.Parameter(shared.detach().clone(), requires_grad=False)

    @contextmanager
    def sharing(self) -> Iterator[None]:
        """Context in which the base holds the weight that it shares with others, whatever is merged here."""
        if not self._shared:
            yield
            return
        merged = self.base_layer.weight
        (self.base_layer.weight,) = self._shared
        try:
            yield
        finally:
            self._shared = (self.base_layer.weight,)
            self.base_layer.weight = merged

    @contextmanager
    def unmerged(self) -> Iterator[None]:
        """Context in which the base weight is the one from before ``merge_``."""
        if self._unmerged is None:
            yield
            return
        merged = self.codec.snapshot(self.base_layer)
        self.codec.restore_(self.base_layer, self._unmerged)
        try:
            yield
        finally:
            self.codec.restore_(self.base_layer, merged)
