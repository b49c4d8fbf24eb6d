"""What a start is asked for and what it gives, and the registry of ways to find one.

A method takes a ``Problem`` and returns a ``LoftQResult``:

    @register_method("mine", statistics="full")
    def mine(problem: Problem) -> LoftQResult: ...

and is then reached as ``factorize(..., method="mine")`` and from everything that calls it. What it says of itself
there is what the callers provide: second moments of the inputs, and inputs of the model as far as it is quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from torch import Tensor

from qlora_kit.codecs.codebooks import is_rotated
from qlora_kit.codecs.quantized import Quantized, Quantizer
from qlora_kit.errors import ConfigError, closest
from qlora_kit.lowrank import norm

from .factors import Factors, made
from .halves import Half
from .metric import DAMPING, Metric, output_norm

# Rows that are rounded to see what rounding leaves of all.
_ROWS = 64


@dataclass(frozen=True)
class Problem:
    """One weight to quantize and correct.

    Attributes:
        weight: float32 (out, in), finite.
        rank, scaling: of the adapter.
        quantize: the deployed quantizer.
        steps: the most alternations.
        statistics: float32 second moments of the inputs, (in, in) or their diagonal (in,), or None.
        cross: float32 (in, in) E[x x^^T], of the inputs x of the original model with those x^ that ``statistics``
            are of, or None where they are the same.
        damping: share of the mean square that is added to each input's own, see ``loftq.methods.metric``.
        scale_search: search the scales, or not; None is the method's own choice.
        solver, seed: of the decomposition, see ``qlora_kit.lowrank.truncated_svd``.
        factors: where what is made of ``statistics`` and ``cross`` is kept for other weights with the same.
        half: the same moments of about half of the inputs, where what is found from one half is to be held against
            the other.
        adapter_aware: let rounding lean on the adapter, see ``loftq.methods.leaning``, or not; None is the method's
            own choice.
        shortfall: float32 (out, in) E[(h - h^) x^^T] of what the layer's output is added to, h in the original model
            and h^ in the quantized, or None where it is added to nothing that is known.
    """

    weight: Tensor
    rank: int
    scaling: float
    quantize: Quantizer
    steps: int
    statistics: Tensor | None = None
    solver: str = "auto"
    seed: int = 0
    cross: Tensor | None = None
    damping: float = DAMPING
    scale_search: bool | None = None
    factors: Factors | None = None
    half: Half | None = None
    adapter_aware: bool | None = None
    shortfall: Tensor | None = None

    def metric(self, *, diagonal: bool = False) -> Metric:
        """That of the ``statistics``, see ``Metric.of``; made once for all problems that share ``factors``."""
        if self.statistics is None:
            return Metric()
        find = partial(Metric.of, self.statistics, diagonal=diagonal, damping=self.damping)
        return made(self.factors, (self.statistics,), ("metric", diagonal, self.damping), find)

    def zero_residual(self) -> Tensor:
        """W - quantize(W), float32 (out, in): what a start from zero leaves."""
        return self.weight - self.quantize(self.weight).dequantize()

    @cached_property
    def zero_norms(self) -> tuple[float, float]:
        """||E|| and, with statistics R, sqrt(tr(E R E^T)), else 0, of that residual E.

        A rotated type leaves about the same share of each row, and its codes may take a search: there some rows tell.
        """
        weight = some_rows(self.weight) if is_rotated(self.quantize.quant_type) else self.weight
        told = norm(self.weight) / (norm(weight) or 1.0) if weight is not self.weight else 1.0
        residual = replace(self, weight=weight).zero_residual()
        felt = 0.0 if self.statistics is None else output_norm(residual, self.statistics)
        return told * norm(residual), told * felt

    def ended(self, history: Sequence[float]) -> bool:
        """Whether alternations with the errors ``history`` so far are over: enough, or the last was no better."""
        return len(history) == self.steps or (len(history) > 1 and history[-1] >= history[-2])


def some_rows(matrix: Tensor) -> Tensor:
    """Evenly spaced rows of ``matrix``, 64 to 191, or all where there are no more: what rounding leaves of them tells
    of all.

    An odd number of rows apart: heads have as many rows as a power of two, and those at one place in their heads, where
    positions turn them fastest, say, are alike and unlike others.
    """
    step = len(matrix) // _ROWS
    step -= 1 - step % 2
    return matrix[::step].contiguous() if step > 1 else matrix


@dataclass(frozen=True)
class LoftQResult:
    """W ~ ``quantized.dequantize() + scaling * B @ A``.

    Attributes:
        quantized: the best iterate's quantized weight.
        A, B: its factors, float32 (rank, in) and (out, rank), row i of A as long as column i of B.
        history: relative error of W - Q - s B A after each step that ran, in the norm that the method minimizes:
            Frobenius, or weighted by the inputs; 0 where W is 0.
        zero_error: ||W - quantize(W)|| / ||W|| (Frobenius), the error of the zero start; of rotated types as some rows
            tell it.
        quantization_error: ||W - Q|| / ||W|| of the quantized weight returned.
        error: ||W - Q - s B A|| / ||W|| of what is returned; None means the least of ``history``.
        goal: what Q + sBA comes close to where that isn't W itself, float32 (out, in).
        output_error, zero_output_error: sqrt(tr(E R E^T) / tr(V R V^T)) of what is returned, E being what it leaves of
            the ``goal`` V, and of the zero start, whose V is W, where statistics R were given.
    """

    quantized: Quantized
    A: Tensor
    B: Tensor
    history: list[float] = field(repr=False)
    zero_error: float
    quantization_error: float
    output_error: float | None = None
    zero_output_error: float | None = None
    goal: Tensor | None = field(default=None, repr=False)
    error: float = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.error is None:
            object.__setattr__(self, "error", min(self.history))


@dataclass(frozen=True)
class Needs:
    """What a method has to be given: "diagonal" or "full" second moments of the inputs (None: none), and whether
    of the inputs that the quantized model sees, each layer after the ones before it. And, where there is one, a way to
    foretell the output error that it would leave; None of that is that it can't be told."""

    statistics: str | None = None
    sequential: bool = False
    foretell: Callable[[Problem], float | None] | None = None


Method = Callable[[Problem], LoftQResult]
_registry: dict[str, Method] = {}
_needs: dict[str, Needs] = {}


def register_method(
    name: str,
    *,
    statistics: str | None = None,
    sequential: bool = False,
    foretell: Callable[[Problem], float | None] | None = None,
) -> Callable[[Method], Method]:
    """Decorator: find starts by this function where ``method=name``; the latest registration wins.

    Args:
        statistics, sequential, foretell: see ``Needs``.
    """

    def register(method: Method) -> Method:
        _registry[name], _needs[name] = method, Needs(statistics, sequential, foretell)
        return method

    return register


def method_for(name: str) -> Method:
    """The registered method.

    Raises:
        ConfigError: no method has that name; lists the known ones.
    """
    if name not in _registry:
        near = closest(str(name), _registry)
        raise ConfigError(
            f"method: expected one of {sorted(_registry)}, found {name!r}; "
            f"{f'the closest are {near}' if near else 'pass one of these'}, or add it with loftq.register_method"
        )
    return _registry[name]


def needs_of(name: str) -> Needs:
    """What the registered method has to be given. Raises ConfigError as ``method_for`` does."""
    method_for(name)
    return _needs.get(name, Needs())
