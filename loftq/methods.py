"""What a start is asked for and what it gives, and the registry of ways to find one.

A method takes a ``Problem`` and returns a ``LoftQResult``:

    @register_method("mine")
    def mine(problem: Problem) -> LoftQResult: ...

and is then reached as ``factorize(..., method="mine")`` and from everything that calls it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qlora_kit.codecs.quantized import Quantized
from qlora_kit.errors import ConfigError, closest

from .quantizers import Quantizer


@dataclass(frozen=True)
class Problem:
    """One weight to quantize and correct.

    Attributes:
        weight: float32 (out, in), finite.
        rank, scaling: of the adapter.
        quantize: the deployed quantizer.
        steps: the most alternations.
        statistics: float32 second moments of the inputs, (in, in) or their diagonal (in,), or None.
        solver, seed: of the decomposition, see ``qlora_kit.lowrank.truncated_svd``.
    """

    weight: Tensor
    rank: int
    scaling: float
    quantize: Quantizer
    steps: int
    statistics: Tensor | None = None
    solver: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class LoftQResult:
    """W ~ ``quantized.dequantize() + scaling * B @ A``.

    Attributes:
        quantized: the best iterate's quantized weight.
        A, B: its factors, float32 (rank, in) and (out, rank), singular values shared evenly.
        history: relative error ||W - Q - s B A|| / ||W|| (Frobenius) after each step that ran; 0 where W is 0.
        zero_error: the same of the zero start, ||W - quantize(W)|| / ||W||.
        quantization_error: ||W - Q|| / ||W|| of the quantized weight returned.
        output_error, zero_output_error: sqrt(tr(E R E^T) / tr(W R W^T)) of what is returned and of the zero
            start, where statistics R were given.
    """

    quantized: Quantized
    A: Tensor
    B: Tensor
    history: list[float] = field(repr=False)
    zero_error: float
    quantization_error: float
    output_error: float | None = None
    zero_output_error: float | None = None

    @property
    def error(self) -> float:
        """The relative error of what is returned: the least of ``history``."""
        return min(self.history)


Method = Callable[[Problem], LoftQResult]
_registry: dict[str, Method] = {}


def register_method(name: str) -> Callable[[Method], Method]:
    """Decorator: find starts by this function where ``method=name``; the latest registration wins."""

    def register(method: Method) -> Method:
        _registry[name] = method
        return method

    return register


def method_for(name: str) -> Method:
    """The registered method.

    Raises:
        ConfigError: no method has that name; lists the known ones.
    """
    if name not in _registry:
        raise ConfigError(
            f"method: expected one of {sorted(_registry)}, found {name!r}; the closest are "
            f"{closest(str(name), _registry)}, or add it with loftq.register_method"
        )
    return _registry[name]


def norm(matrix: Tensor) -> float:
    """The Frobenius norm; rows are summed up in float64, since steps that differ in the seventh digit are compared."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(matrix, dim=1), dtype=torch.float64))


def output_norm(matrix: Tensor, statistics: Tensor) -> float:
    """sqrt(E ||matrix @ x||^2) = sqrt(tr(matrix R matrix^T)) for inputs of second moments R, or its diagonal."""
    if statistics.dim() == 1:
        return norm(matrix * statistics.sqrt())
    return float(((matrix @ statistics) * matrix).sum(dtype=torch.float64).clamp_min(0).sqrt())


def checked_statistics(statistics: Tensor | None, weight: Tensor) -> Tensor | None:
    """``statistics`` in float32 on the weight's device.

    Raises:
        ConfigError: they can't be second moments of this weight's inputs.
    """
    if statistics is None:
        return None
    width = weight.shape[1]
    if tuple(statistics.shape) not in ((width,), (width, width)):
        raise ConfigError(
            f"statistics: expected second moments of shape ({width}, {width}) or their diagonal ({width},) for a "
            f"weight {tuple(weight.shape)}, found {tuple(statistics.shape)}; collect them from this layer's inputs"
        )
    moments = statistics.detach().to(weight.device, torch.float32)
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    if not moments.isfinite().all() or (diagonal < 0).any():
        raise ConfigError(
            "statistics: expected finite second moments with a diagonal of at least 0, found NaN, infinity or a "
            "negative mean square; collect them in float32 or better"
        )
    return moments
