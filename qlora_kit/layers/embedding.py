"""Low-rank branches on an embedding table.

In the matrix convention y = W x of the other families, x is one-hot, W is (dim, vocabulary) and A (r,
vocabulary) is looked up instead of multiplied. As in PEFT, dropout isn't applied: the input is an index.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..codecs import Codec
from .base import AdapterLayer
from .named import NamedParameters
from .registry import register_layer


@register_layer(nn.Embedding)
class EmbeddingAdapter(AdapterLayer):
    """``lora_embedding_A[name]`` is (r, vocabulary), ``lora_embedding_B[name]`` is (dim, r)."""

    family = "embedding"
    factor_names = ("lora_embedding_A", "lora_embedding_B")

    def __init__(self, base_layer: nn.Module, codec: Codec | None = None) -> None:
        super().__init__(base_layer, codec)
        self.lora_embedding_A = NamedParameters()
        self.lora_embedding_B = NamedParameters()

    def new_factors_(self, name: str, A: Tensor, B: Tensor) -> None:
        self.lora_embedding_A[name] = nn.Parameter(A)
        self.lora_embedding_B[name] = nn.Parameter(B)

    def tie_factors_(self, name: str, source: AdapterLayer) -> None:
        A, B = source.adapter_tensors(name).values()
        self.lora_embedding_A[name], self.lora_embedding_B[name] = A, B

    def branch(self, x: Tensor, name: str) -> Tensor:
        A, B = self.lora_embedding_A[name], self.lora_embedding_B[name]
        rows = F.embedding(x, A.T, padding_idx=self.base_layer.padding_idx)
        result = F.linear(rows * self.scaling[name], B)
        # Some models (Gemma) multiply the table's rows in the module's own forward; the branch stands
        # beside the table, so it is multiplied too.
        scale = getattr(self.base_layer, "embed_scale", None)
        return result if scale is None else result * scale
