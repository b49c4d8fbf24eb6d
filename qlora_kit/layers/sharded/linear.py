"""Low-rank branches on linear layers of which each rank holds some columns or rows; see ``sharding``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...codecs import Codec
from ...codecs.shards.tensors import is_dtensor
from ..fused.choice import chosen_branch
from ..fused.linear import Made
from ..fused.mask import Mask
from ..linear import LinearAdapter
from ..registry import register_sharded
from .collectives import piece_of
from .parts import local
from .sharded import ShardedLayer
from .sharding import Form
from .thin import thin_branch
from .together import check_in_step


@register_sharded(LinearAdapter)
class ShardedLinearAdapter(ShardedLayer, LinearAdapter):
    """``lora_A[name].weight`` and ``lora_B[name].weight`` are this rank's parts: DTensors of the whole over a mesh.

    The base's forward may give a tuple, of which ``added`` in a subclass knows the output.
    """

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        super().__init__(base_layer, codec)
        self._draws = 0  # how often dropout has been drawn; whether all ranks draw the same is asked at 1, 2, 4, 8, ...

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.refuse_rows(kwargs)
        result = self.codec.forward(self.base_layer, x, *args, **kwargs)
        for name in self._in_effect:
            result = self.added(result, self.branch(x, name))
        return result

    def of_made(self, made: Made, given: Sequence[Tensor]) -> Any:
        return self(made.make(*given))

    def added(self, result: Any, branch: Tensor) -> Any:
        """What the base gave, and the branch in the same form beside it."""
        branch = branch.to(result.dtype)
        return result + (self.as_output(result, branch) if is_dtensor(result) else branch)

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = (local(factor) for factor in self.adapter_tensors(name).values())
        x, takes = self.as_input(x)
        if type(dropout := self.lora_dropout[name]) is not nn.Identity:
            x = self.dropped(x, dropout, takes)
        x = self.cast_input(x, A.dtype)
        return thin_branch(self.sharding, x, A, B, scale=self.scaling[name], takes=takes)

    def dropped(self, x: Tensor, dropout: nn.Module, takes: Form) -> Tensor:
        """``x`` after dropout. What is dropped is drawn for the whole input, of which each rank takes its piece: so
        ranks' generators, of which whole inputs need the same draws, stay in step, and one process draws the same."""
        if type(dropout) is not nn.Dropout or not dropout.training:
            return dropout(x)
        how, shape, dim = self.sharding, list(x.shape), 0
        if takes == "features":
            dim, shape[-1] = x.dim() - 1, self.sharding.shape[1]
        elif takes == "sequence":
            dim, shape[how.sequence_dim] = how.sequence_dim, x.shape[how.sequence_dim] * how.size
        like, plain = torch.empty(shape, dtype=x.dtype, device=x.device), chosen_branch() == "plain"
        self._draws += 1
        if self._draws.bit_count() == 1:  # ranks that have parted stay so
            check_in_step(how, x.device if plain else torch.device("cpu"))
        if plain:
            kept: Tensor = dropout(like.fill_(1.0))
        else:
            mask = Mask.draw(dropout.p)
            kept = like.fill_(1.0) if mask is None else mask.kept(like).mul_(mask.scale)
        return x * (kept if takes == "whole" or how.size == 1 else piece_of(kept, dim, how.group))
