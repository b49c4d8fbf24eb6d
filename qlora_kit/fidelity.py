"""What a merge kept: each layer's numbers, and the report of a whole model.

Rounding to few bits can swallow a small delta whole, so one number isn't enough. ``error`` says how far the
stored weight is from the ideal one, in units of the weight; ``retained`` how much of the delta is still there
along its own direction; ``delta_error`` what the rounding did, in units of the delta. Above 1 it means that
the merged weight is further from the ideal than the weight without the adapter was.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerFidelity:
    """One layer's merge, all norms Frobenius; ideal = base + delta, stored = what was written.

    Attributes:
        codec: how the merged weight is stored.
        delta_ratio: ||delta|| / ||base||.
        retained: <stored - base, delta> / ||delta||^2, the share of the delta that is still there; 1 is all.
        error: ||stored - ideal|| / ||ideal||, the rounding of the storage.
        delta_error: ||stored - ideal|| / ||delta||.
    """

    path: str
    codec: str
    delta_ratio: float
    retained: float
    error: float
    delta_error: float


@dataclass
class MergeReport:
    """The merged model and, layer by layer, what the merge kept. ``str(report)`` is a table."""

    model: nn.Module
    into: str
    adapters: list[str]
    layers: list[LayerFidelity] = field(default_factory=list)

    def mean(self, attribute: str) -> float:
        """The mean of a ``LayerFidelity`` attribute over the layers."""
        return sum(getattr(layer, attribute) for layer in self.layers) / max(len(self.layers), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the model."""
        return {
            "into": self.into,
            "adapters": list(self.adapters),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        width = max([len(layer.path) for layer in self.layers] + [6])
        lines = [
            f"{'layer':{width}}  {'stored as':9} {'|delta|/|W|':>11} {'retained':>9} {'error/|W|':>9} {'/|delta|':>9}"
        ]
        for layer in self.layers:
            lines.append(
                f"{layer.path:{width}}  {layer.codec:9} {layer.delta_ratio:11.4f} {layer.retained:9.1%} "
                f"{layer.error:9.2e} {layer.delta_error:9.2e}"
            )
        storage = "each module's own storage" if self.into == "same" else self.into
        lines.append(
            f"{len(self.layers)} layers merged into {storage}: {self.mean('retained'):.1%} of the delta retained, "
            f"mean error {self.mean('error'):.2e}"
        )
        return "\n".join(lines)


def fidelity(path: str, codec: str, base: Tensor, delta: Tensor, stored: Tensor) -> LayerFidelity:
    """Compare float32 (out, in) matrices: the weight before the merge, what was added, and what is stored."""
    energy = delta.square().sum()
    retained = ((stored - base) * delta).sum() / energy if energy > 0 else torch.ones(())
    ideal = base + delta
    lost = stored - ideal
    return LayerFidelity(
        path=path,
        codec=codec,
        delta_ratio=_ratio(delta, base),
        retained=retained.item(),
        error=_ratio(lost, ideal),
        delta_error=_ratio(lost, delta),
    )


def _ratio(part: Tensor, whole: Tensor) -> float:
    """||part|| / ||whole||, where 0 / 0 is 0."""
    norm, base = torch.linalg.vector_norm(part).item(), torch.linalg.vector_norm(whole).item()
    if base == 0:
        return 0.0 if norm == 0 else float("inf")
    return norm / base
