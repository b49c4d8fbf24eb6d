"""Low-rank branches on tables of which each rank holds some words or some columns; see ``sharding``.

In the (out, in) orientation inputs are one-hot, so a table that is cut by words is a *row*: looking a word up that
another rank holds gives zeros, and the sum over ranks is what the word's own rank found.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...codecs.shards.tensors import is_dtensor
from ..embedding import EmbeddingAdapter
from ..registry import register_sharded
from .collectives import pieces_of
from .parts import local
from .sharded import ShardedLayer
from .thin import thin_branch


@register_sharded(EmbeddingAdapter)
class ShardedEmbeddingAdapter(ShardedLayer, EmbeddingAdapter):
    """``lora_embedding_A[name]`` and ``lora_embedding_B[name]`` are this rank's parts: DTensors over a mesh."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.refuse_rows(kwargs)
        result = self.codec.forward(self.base_layer, x, *args, **kwargs)
        for name in self._in_effect:
            branch = self.branch(x, name).to(result.dtype)
            result = result + (self.as_output(result, branch) if is_dtensor(result) else branch)
        return result

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = (local(factor) for factor in self.adapter_tensors(name).values())
        words = local(x)
        rows = self._own_words(words) if self.sharding.kind == "row" else self._words
        takes = "features" if self.sharding.kind == "row" else "whole"
        result = thin_branch(self.sharding, words, A, B, scale=self.scaling[name], narrow=rows, takes=takes)  # type: ignore[arg-type]
        scale = getattr(self.base_layer, "embed_scale", None)
        return result if scale is None else result * scale

    def _words(self, words: Tensor, A: Tensor) -> Tensor:
        return F.embedding(words, A.T, padding_idx=self.base_layer.padding_idx)

    def _own_words(self, words: Tensor) -> Any:
        """Looks up those of ``words`` that this rank holds, and gives zeros for the others."""
        how = self.sharding
        pieces = pieces_of(how.shape[1], how.size)
        first = sum(pieces[: how.rank])
        own = (words >= first) & (words < first + pieces[how.rank])
        padding = self.base_layer.padding_idx  # whose row has no gradient
        trained = own if padding is None else own & (words != padding)
        places = torch.where(own, words - first, 0)

        def look_up(_: Tensor, A: Tensor) -> Tensor:
            if not A.shape[1]:
                return A.new_zeros(*words.shape, A.shape[0])
            found = F.embedding(places, A.T)
            found = torch.where(trained[..., None], found, found.detach())
            return found * own[..., None].to(found.dtype)

        return look_up
