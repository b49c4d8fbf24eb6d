"""What the families over sharded layers share: factors that are cut and gathered, and the forms of what they compute.

Everyone else sees whole factors: ``add_adapter`` and ``set_factors_`` take them, ``whole_factors`` gives them, files
hold them. What is added to the base's weight, ``factors`` and so ``delta`` and ``stacked``, is the rank's own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...codecs import Codec
from ...codecs.shards.tensors import is_dtensor
from ...errors import AdapterError
from ..base import AdapterLayer
from ..row_choice import rows_of
from ..weight_in_effect import Branch
from .collectives import copy_to_group
from .parts import agreed, cut, gathered, held, local, placed_as
from .sharding import Form, Sharding, sharding_of
from .together import all_or_none


class ShardedLayer(AdapterLayer):
    """Goes before the family's own class among the bases."""

    sharding: Sharding

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        found = sharding_of(base_layer)
        if found is None:
            raise AdapterError(f"{type(base_layer).__name__}: expected a module that is sharded, found one that isn't")
        super().__init__(base_layer, codec)
        self.sharding = found

    # -- factors -------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, A: Tensor, B: Tensor, **settings: Any) -> None:
        """As of other layers, with the whole A (r, in) and B (out, r), the same on all ranks."""
        rank, (out_features, in_features) = A.shape[0], self.sharding.shape
        if A.shape != (rank, in_features) or B.shape != (out_features, rank):
            raise AdapterError(
                f"adapter {name!r}: expected the whole layer's A ({rank}, {in_features}) and B ({out_features}, "
                f"{rank}), found A {tuple(A.shape)} and B {tuple(B.shape)}"
            )
        super().add_adapter(name, *self._cut(A, B), **settings)

    def _cut(self, A: Tensor, B: Tensor) -> list[Tensor]:
        how = self.sharding
        return [cut(how, agreed(how, x), dim) for x, dim in zip((A, B), how.factor_dims, strict=True)]

    def held_factors(self, A: Tensor, B: Tensor) -> list[Tensor]:
        """This rank's parts as parameters hold them."""
        how, (out_features, in_features) = self.sharding, self.sharding.shape
        pairs = zip((A, B), how.factor_dims, (in_features, out_features), strict=True)
        return [held(how, part, dim, size) for part, dim, size in pairs]

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        super().new_factors_(name, *self.held_factors(A, B))

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """This rank's A (r, in) and B (out, r), the parts of its own weight; gradients flow through them."""
        A, B = (local(tensor) for tensor in self.adapter_tensors(name).values())
        return A, B

    @torch.no_grad()
    def whole_factors(self, name: str) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of all ranks together; every rank has to ask."""
        how, (out_features, in_features) = self.sharding, self.sharding.shape
        pairs = zip(self.factors(name), how.factor_dims, (in_features, out_features), strict=True)
        A, B = (gathered(how, part, dim, size) for part, dim, size in pairs)
        return A, B

    @torch.no_grad()
    def set_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        """Overwrite ``name``'s factors with whole A (r, in) and B (out, r) of the same rank."""
        for part, value in zip(self.factors(name), self._cut(A, B), strict=True):
            part.copy_(value)

    def factor_parts(self, name: str) -> dict[str, tuple[Sharding, int]]:
        """Of parameters that are plain tensors of this rank's part: how they are cut, by their suffix in a file."""
        if self.sharding.mesh is not None:
            return {}
        dims = zip(self.adapter_tensors(name), self.sharding.factor_dims, strict=True)
        return {suffix: (self.sharding, dim) for suffix, dim in dims if dim is not None}

    # -- the weight ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge_(self, names: Sequence[str], *, safe: bool = False) -> None:
        """As of other layers, on all ranks or none."""
        back = self.way_back()
        try:
            with all_or_none(self.base_layer):
                super().merge_(names, safe=safe)
        except BaseException:
            back()
            raise

    def weight_branch(self, name: str) -> Branch:
        """As of other layers; of a factor that every rank has whole a part's gradient is a term."""
        (A, B), (cut_A, cut_B), group = self.factors(name), self.sharding.factor_dims, self.sharding.group
        return (
            A if cut_A is not None else copy_to_group(A, group),
            B if cut_B is not None else copy_to_group(B, group),
            self.scaling[name],
        )

    def _weight_in_effect(self) -> Tensor:
        """As of other layers; where the base's weight is a DTensor so is the sum."""
        weight: Any = self.base_layer.weight
        names = self._in_effect
        if not is_dtensor(weight) or not names:
            return super()._weight_in_effect()
        total: Any = sum(s * (B @ A) for A, B, s in map(self.weight_branch, names))
        laid_out = self.codec.laid_out(self.base_layer, total)
        assert laid_out is not None
        return self.as_output(weight, (local(weight) + laid_out).to(weight.dtype))

    # -- activations ---------------------------------------------------------------------------------------

    def refuse_rows(self, kwargs: dict[str, Any]) -> None:
        """Ranks add up and gather whole inputs, of which rows with adapters of their own aren't told apart.

        Raises:
            AdapterError: the call, or the block that it is in, gives each row an adapter.
        """
        if rows_of(self, kwargs) is not None:
            raise AdapterError(
                f"{type(self.base_layer).__name__}: expected one adapter for all rows over a layer that is sharded, "
                "found adapter_names; set_adapter(name) and call with the rows of one adapter at a time"
            )

    def as_input(self, x: Tensor) -> tuple[Tensor, Form]:
        """``x`` as a plain tensor, and the form it comes in, whatever that is for the base."""
        how = self.sharding
        if not is_dtensor(x):
            return x, how.takes
        from torch.distributed.tensor import Replicate, Shard

        (placement,), form = x.placements, None  # type: ignore[attr-defined]
        if placement == Replicate():
            form = "whole"
        elif isinstance(placement, Shard):
            last = placement.dim % x.dim() == x.dim() - 1
            form = "features" if last else "sequence" if placement.dim == how.sequence_dim else None
        if (form, how.kind) in (("features", "column"), ("sequence", "row"), (None, "row"), (None, "column")):
            x, form = x.redistribute(placements=[Replicate()]), "whole"  # type: ignore[attr-defined]
        return local(x), form  # type: ignore[return-value]

    def as_output(self, result: Tensor, branch: Tensor) -> Tensor:
        """This rank's part ``branch`` of a DTensor that is placed as ``result`` is."""
        return placed_as(result, branch)
