"""What a merge kept of one layer, in numbers.

Rounding to few bits can swallow a small delta whole, so one number isn't enough. ``error`` says how far the
stored weight is from the ideal one, in units of the weight; ``retained`` how much of the delta is still there
along its own direction; ``delta_error`` what the rounding did, in units of the delta. Above 1 it means that
the merged weight is further from the ideal than the weight without the adapter was.

All of them come from the ideal weight, the factors of the delta and the stored weight a few rows at a time: with
L = stored - ideal, stored - base is L + delta, and <L, B A> is <L A^T, B>. Neither the delta nor the base need be
there as a matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs.finite import all_finite
from ..errors import MergeError
from ..layers.sharded.sharding import Sharding
from ..layers.sharded.together import summed
from ..lowrank import add_product_, norm, share_arrived


@dataclass(frozen=True)
class LayerFidelity:
    """One layer's merge, all norms Frobenius; ideal = base + delta, stored = what was written, a residual branch
    included.

    Attributes:
        codec: how the merged weight is stored.
        delta_ratio: ||delta|| / ||base||.
        retained: <stored - base, delta> / ||delta||^2, the share of the delta that is still there; 1 is all.
        error: ||stored - ideal|| / ||ideal||, the rounding of the storage.
        delta_error: ||stored - ideal|| / ||delta||, that rounding against what was to be kept: the ratio that
            predicts trouble.
        base_error: ||original - dequantized|| / ||delta|| of a base that was quantized, where the original was read.
        rank: of the residual branch; 0 without.
        delta_norm: ||delta||, by whose square layers count in the share that a whole model retained.
        arrived: <stored - base, delta>_R / <delta, delta>_R for inputs of second moments R, where they are known: the
            share that is there in the layer's output. Codes that make up for one another can bring a delta whole there
            of which the weight alone shows little.
    """

    path: str
    codec: str
    delta_ratio: float
    retained: float
    error: float
    delta_error: float
    base_error: float | None = None
    rank: int = 0
    delta_norm: float = 0.0
    arrived: float | None = None

    @property
    def kept(self) -> float:
        """The share of the delta that is left: in the output where that is known, else in the weight."""
        return self.retained if self.arrived is None else self.arrived


def share_of(layers: Iterable[LayerFidelity], attribute: str = "kept") -> float:
    """The share of the layers' deltas that is left, each counting by its delta's square; 1 of none."""
    squares = [(getattr(layer, attribute), layer.delta_norm**2) for layer in layers]
    total = sum(square for _, square in squares)
    return sum(kept * square for kept, square in squares) / total if total else 1.0


def norms_of(weight: Tensor, A: Tensor, B: Tensor) -> dict[str, float]:
    """The norms of what is to be added and of what it is added to, for ``compare``; arguments as of ``add_delta_``."""
    return {"delta": _product_norm(A, B), "base": norm(weight)}


def add_delta_(weight: Tensor, A: Tensor, B: Tensor, path: str) -> None:
    """Make ``weight`` float32 (out, in) the ideal merged weight, in its place.

    Args:
        A, B: float32 (rank, in) and (out, rank), the delta being B @ A; see ``AdapterLayer.stacked``.

    Raises:
        MergeError: the sum isn't finite; names ``path``.
    """
    add_product_(weight, A, B)
    check_finite(path, weight)


def compare(
    path: str,
    codec: str,
    ideal: Tensor,
    delta: tuple[Tensor, Tensor],
    norms: dict[str, float],
    stored: Iterable[tuple[slice, Tensor]],
    residual: tuple[Tensor, Tensor] | None = None,
    base_error: float | None = None,
    moments: Tensor | None = None,
    sharding: Sharding | None = None,
) -> LayerFidelity:
    """The numbers of one layer.

    Args:
        ideal: float32 (out, in), what ``add_delta_`` made. norms: what ``norms_of`` said before.
        delta: A and B of the delta. residual: those of a branch that stays beside the stored weight.
        stored: the stored weight in pieces, ``codec.pieces(module)``; they are overwritten.
        base_error: ||original - dequantized||.
        moments: second moments (in, in) of the inputs, or their diagonal (in,).
        sharding: where all of this is one process's part of a layer, who has the others; the numbers are then the whole
            layer's, on every process.

    Raises:
        MergeError: the stored weight isn't finite; names ``path``.
    """
    A, B = delta
    lost_square, weighed = 0.0, None if moments is None else A * moments if moments.dim() == 1 else A @ moments
    missing, missing_output = torch.zeros_like(B), torch.zeros_like(B)
    for rows, values in stored:
        check_finite(path, values)
        lost = values.sub_(ideal[rows])
        if residual is not None:
            add_product_(lost, residual[0], residual[1][rows])
        lost_square += norm(lost) ** 2
        missing[rows] -= lost @ A.T
        if weighed is not None:
            missing_output[rows] -= lost @ weighed.T
    size, lost_norm, base, whole = norms["delta"], lost_square**0.5, norms["base"], norm(ideal)
    retained = share_arrived(missing, B, A.double() @ A.double().T)
    if sharding is not None:  # squares of parts add up to the whole's
        squares = [part**2 for part in (size, lost_norm, base, whole)]
        *squares, left = summed(sharding, [*squares, retained * size**2])
        retained = left / squares[0] if squares[0] else 1.0
        size, lost_norm, base, whole = (square**0.5 for square in squares)
    return LayerFidelity(
        path=path,
        codec=codec,
        delta_ratio=_ratio(size, base),
        retained=retained,
        error=_ratio(lost_norm, whole),
        delta_error=_ratio(lost_norm, size),
        base_error=None if base_error is None else _ratio(base_error, size),
        rank=0 if residual is None else residual[0].shape[0],
        delta_norm=size,
        arrived=None if weighed is None else share_arrived(missing_output, B, weighed.double() @ A.double().T),
    )


def check_finite(path: str, weight: Tensor) -> None:
    """Raise a MergeError that names ``path`` if ``weight`` holds NaN or infinity."""
    if not all_finite(weight):
        raise MergeError(
            f"{path}: expected a finite merged weight, found NaN or infinite values in {weight.dtype}; check the "
            "adapter for overflow, or merge into a wider dtype (no layer was changed)"
        )


def checked_cast(path: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``'s values in ``dtype`` (what isn't a float stays).

    Raises:
        MergeError: a finite value becomes infinite; names ``path``.
    """
    if not tensor.is_floating_point():
        return tensor.data
    cast = tensor.data.to(dtype)
    if not all_finite(cast) and (cast.isinf() & tensor.data.isfinite()).any():
        raise MergeError(
            f"{path}: a value overflows {dtype}; merge into a wider dtype, such as 'bfloat16' (no layer was changed)"
        )
    return cast


def _product_norm(A: Tensor, B: Tensor) -> float:
    """||B @ A|| from the two small Gram matrices."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def _ratio(part: float, whole: float) -> float:
    """part / whole, where 0 / 0 is 0."""
    if whole == 0:
        return 0.0 if part == 0 else float("inf")
    return part / whole
