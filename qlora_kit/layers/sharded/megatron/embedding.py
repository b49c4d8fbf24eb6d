"""Branches beside Megatron's tables, of which each rank has the words of a range."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...embedding import EmbeddingAdapter
from ..sharded import ShardedLayer
from ..thin import thin_branch
from .linear import mark_


class MegatronEmbedding(ShardedLayer, EmbeddingAdapter):
    """``lora_embedding_A[name]`` is (r, this rank's words), ``lora_embedding_B[name]`` (dim, r)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.refuse_rows(kwargs)
        return super().forward(x, *args, **kwargs)

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = self.factors(name)
        return thin_branch(self.sharding, x, A, B, scale=self.scaling[name], narrow=self._looked_up)

    def _looked_up(self, words: Tensor, A: Tensor) -> Tensor:
        """This rank's columns of A for its own ``words`` (batch, sequence), zeros for those of others, in the layout of
        the base's output."""
        table = self.base_layer
        own = (words >= table.vocab_start_index) & (words < table.vocab_end_index)
        found = F.embedding((words - table.vocab_start_index).where(own, 0), A.T) * own[..., None]
        return found.transpose(0, 1) if table.reduce_scatter_embeddings else found

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        super().new_factors_(name, A, B)
        mark_(self.adapter_tensors(name).values(), self.sharding)
