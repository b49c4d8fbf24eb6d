"""Modules that keep one floating-point ``weight``: linear, embedding (transposed), convolution (flattened).

The three differ only in how the stored tensor maps to the (out, in) matrix, so each is one pair of views,
``_to_matrix`` and ``_from_matrix``; reading and writing are said once. Transposed convolutions are not
registered: their weight is (in, out / groups, ...), and with groups no single matrix stands for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CodecError
from ..kernels.scratch import scratch
from .autocast import without_autocast
from .base import Codec, autocast_dtype, checked_weight, described, not_finite
from .finite import all_finite
from .pieces import row_pieces
from .plain_weight import Trial, filled, holding_values, reason_against_forward, reason_against_weight
from .registry import register_codec, registered_type


@register_codec(nn.Linear)
class DenseCodec(Codec):
    """``nn.Linear``: the stored weight is the (out, in) matrix, in any floating dtype."""

    name = "dense"

    def reason_against(self, module: nn.Module) -> str | None:
        """For storage of another kind to be read by a codec that builds on this one, override it."""
        return reason_against_weight(module) or self._reason_against_forward(module)

    def _reason_against_forward(self, module: nn.Module) -> str | None:
        return reason_against_forward(module, registered_type(type(module)), self._trial)

    def _trial(self, module: nn.Module) -> Trial:
        """What shows whether a forward that overrides the registered type's does the same."""
        return Trial(holding_values(nn.Linear(5, 4, device="meta")), [filled(2, 3, 5), filled(3, 5)])

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.out_features, module.in_features  # type: ignore[return-value]

    def read(self, module: nn.Module) -> Tensor:
        matrix = self._to_matrix(self._weight(module).detach())
        return matrix.to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    def plus(self, module: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """In float32 the sum is written where a copy would be."""
        if type(self).read is not DenseCodec.read:  # of another storage
            return super().plus(module, A, B)
        stored = self._weight(module).detach()
        if stored.dtype != torch.float32:
            return super().plus(module, A, B)
        with without_autocast(stored.device):
            return torch.addmm(self._to_matrix(stored), B, A)

    def add_(self, module: nn.Module, A: Tensor, B: Tensor) -> None:
        """In float32 the stored tensor itself takes the sum."""
        stored = self._weight(module).detach()
        own = type(self).read is DenseCodec.read and type(self).write_ is DenseCodec.write_
        if not own or stored.dtype != torch.float32 or not stored.is_contiguous():
            return super().add_(module, A, B)
        with without_autocast(stored.device):
            self._to_matrix(stored).addmm_(B, A)
        if not all_finite(stored):
            raise not_finite(module, stored.dtype)

    def pieces(self, module: nn.Module) -> Iterator[tuple[slice, Tensor]]:
        matrix = self._to_matrix(self._weight(module).detach())
        for rows in row_pieces(matrix.shape):
            yield rows, matrix[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)

    @torch.no_grad()
    def write_(self, module: nn.Module, weight: Tensor) -> None:
        stored = self._weight(module)
        weight = checked_weight(module, weight, self.shape(module), stored.dtype)
        stored.copy_(self._from_matrix(weight, stored.shape))

    def take_over_(self, module: nn.Module, weight: Tensor) -> Any:
        """Where the memory is the weight's alone: ``weight`` itself, or what is made of it for another dtype."""
        if type(self).write_ is not DenseCodec.write_:  # of another storage
            return None
        stored = self._weight(module)
        storage = stored.untyped_storage()
        alone = storage.nbytes() == stored.nbytes and not storage.is_shared()
        like = stored.device == weight.device and tuple(weight.shape) == self.shape(module)
        like = like and stored.is_inference() == weight.is_inference()  # such memory can't be trained beside afterwards
        matrix = self._from_matrix(weight.detach(), stored.shape)
        if not (alone and like and stored.is_contiguous()):
            return None
        new = matrix.to(stored.dtype).contiguous()
        if not all_finite(new):
            raise not_finite(module, stored.dtype)
        before: Tensor = stored.data
        stored.data = new
        return before

    def compute_dtype(self, module: nn.Module) -> torch.dtype:
        return self._weight(module).dtype

    def linear_dtypes(self, module: nn.Module, x: Tensor) -> tuple[torch.dtype, torch.dtype] | None:
        dtype, stored = autocast_dtype(x), module.weight.dtype
        return (dtype, dtype) if dtype == stored or torch.is_autocast_enabled(x.device.type) else None

    def multiplier(self, module: nn.Module, dtype: torch.dtype) -> Tensor:
        matrix = self._to_matrix(self._weight(module).detach())
        return matrix if matrix.dtype == dtype else scratch(matrix.shape, dtype, matrix.device).copy_(matrix)

    def laid_out(self, module: nn.Module, matrix: Tensor) -> Tensor | None:
        weight: Any = module.weight
        stored = weight.is_floating_point() and weight.numel() == matrix.numel() and not hasattr(weight, "quant_state")
        return self._from_matrix(matrix, weight.shape) if stored else None

    def matrix_of(self, stored: Tensor) -> Tensor:
        return self._to_matrix(stored)

    def _weight(self, module: nn.Module) -> Tensor:
        weight: Tensor = module.weight  # type: ignore[assignment]
        # Packed codes may be stored under a floating dtype; then only their own codec can read them.
        if not weight.is_floating_point() or getattr(weight, "quant_state", None) is not None:
            raise CodecError(
                f"{described(module)}.weight: expected a floating-point weight, found "
                f"{type(weight).__name__} of {weight.dtype}; "
                "leave the module out of the targets or register a codec for its type"
            )
        return weight

    def _to_matrix(self, stored: Tensor) -> Tensor:
        return stored

    def _from_matrix(self, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return matrix


class TransposedCodec(DenseCodec):
    """A weight stored as (in, out)."""

    def _to_matrix(self, stored: Tensor) -> Tensor:
        return stored.t()

    def _from_matrix(self, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return matrix.t()


@register_codec(nn.Embedding)
class EmbeddingCodec(TransposedCodec):
    """``nn.Embedding``: the table is (vocabulary, dim), and a token's vector is a column of the matrix."""

    name = "embedding"

    def _trial(self, module: nn.Module) -> Trial:
        sample: Any = holding_values(nn.Embedding(7, 4, device="meta"))
        # No words in the order of their places: a table of positions, which looks those up, would pass.
        words = torch.tensor([[5, 1, 3], [2, 0, 6]], device="cpu")
        scale = getattr(module, "embed_scale", None)  # of transformers' ScaledWordEmbedding; the layer family has it
        if scale is None:
            return Trial(sample, [words])
        if isinstance(scale, Tensor):
            sample.register_buffer("embed_scale", torch.tensor(3.0, device="cpu"))
        else:
            sample.embed_scale = 3.0
        return Trial(sample, [words], 3.0)

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings  # type: ignore[return-value]


@register_codec(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class ConvCodec(DenseCodec):
    """Convolutions: (out, in / groups, *kernel) flattened to (out, in / groups * prod(kernel))."""

    name = "conv"

    def _trial(self, module: nn.Module) -> Trial:
        dimensions = len(module.kernel_size)  # type: ignore[arg-type]
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        sample = holding_values(kind(2, 3, kernel_size=3, padding=1, device="meta"))
        return Trial(sample, [filled(1, 2, *range(5, 5 + dimensions))])

    def shape(self, module: nn.Module) -> tuple[int, int]:
        kernel: tuple[int, ...] = module.kernel_size  # type: ignore[assignment]
        fan_in = module.in_channels // module.groups * prod(kernel)  # type: ignore[operator]
        return module.out_channels, fan_in  # type: ignore[return-value]

    def _to_matrix(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def _from_matrix(self, matrix: Tensor, stored_shape: torch.Size) -> Tensor:
        return matrix.reshape(stored_shape)


def take_bias_(module: Any, source: Any) -> None:
    """Give ``module`` a copy of ``source``'s bias, and its training flag."""
    if source.bias is not None:
        module.bias = nn.Parameter(source.bias.detach().clone(), requires_grad=source.bias.requires_grad)
    module.train(source.training)


def dense_linear(module: nn.Linear, weight: Tensor, dtype: torch.dtype) -> nn.Module:
    """A frozen ``nn.Linear`` of ``weight`` (out, in) in ``dtype``, with ``module``'s bias copied; a ``Conv1D`` of
    transformers where ``module`` took the place of one, since checkpoints of its model hold it transposed."""
    source = getattr(module, "source_cls", nn.Linear)
    if source.__name__ == "Conv1D":
        with torch.device("meta"):
            conv1d: nn.Module = source(module.out_features, module.in_features)
        conv1d.weight = nn.Parameter(weight.to(dtype).t().contiguous(), requires_grad=False)
        take_bias_(conv1d, module)
        return conv1d.to(dtype)
    dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=dtype)
    dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    take_bias_(dense, module)
    return dense.to(dtype)
