"""What the demo measured, as plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class FineTune:
    """One start, measured on held-out text before and after the same fine-tune; bytes of the frozen base."""

    bits: int
    storage: str
    start: str
    perplexity_before: float
    perplexity_after: float
    seconds: float
    losses: list[float]
    base_bytes: int

    @property
    def label(self) -> str:
        return f"{self.bits}-bit, {self.start}"


@dataclass(frozen=True)
class Reload:
    """The adapter and its base, read back from disk: largest difference of any logit on held-out text."""

    bits: int
    adapter_bytes: int
    base_bytes: int
    largest_difference: float


@dataclass(frozen=True)
class Merged:
    """One way to merge. ``retained`` and ``error`` are means over layers, as ``LayerFidelity`` defines them."""

    into: str
    perplexity: float
    retained: float
    error: float
    weight_bytes: int


@dataclass(frozen=True)
class Generation:
    """Greedy continuations of one prompt, by the name of the model that wrote them."""

    prompt: str
    continuations: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Everything shown at the end; ``to_dict`` is what goes into the JSON file."""

    settings: dict[str, Any]
    environment: dict[str, str]
    parameters: int
    adapted_modules: int
    trainable_parameters: int
    text: dict[str, Any]
    perplexity: float
    fine_tunes: list[FineTune]
    reloads: list[Reload]
    merges: list[Merged]
    generations: list[Generation]
    seconds: float = field(default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
