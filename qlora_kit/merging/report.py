"""What a merge kept of a whole model: a table, plain data, a picture."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints.files import write_text_atomically
from .agreement import Agreement
from .fidelity import LayerFidelity, share_of
from .fidelity_plot import plot

#: What to say of a merge that loses nothing, though it rounds.
TRAINED = "the adapters are trained for this merge (merge_aware): these are the weights that training computed with"


@dataclass
class MergeReport:
    """The merged model and, layer by layer, what the merge kept. ``str(report)`` is a table.

    Attributes:
        model: the merged model; with a residual branch its ``LoraModel``.
        into: what was asked for.
        adapters: the names, and ``weights`` what each was multiplied by.
        layers: of each layer that an adapter adapted.
        base: "dequantized" or "original", the weights that the deltas were added to.
        base_losses: with ``base="auto"``, the loss of either on the text.
        rounding, residual_rank: how k-bit layers were written.
        trained: whether it is the merge that the adapters are trained for (``LoraConfig.merge_aware``): the model then
            computes with the weights that training ended with, whatever share of the deltas rounding shows.
        agreement: of the merged model's output with the adapted one's, where a text was given.
    """

    model: nn.Module
    into: str
    adapters: list[str]
    layers: list[LayerFidelity] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    base: str = "dequantized"
    base_losses: dict[str, float] = field(default_factory=dict)
    rounding: str = "nearest"
    residual_rank: int = 0
    trained: bool = False
    agreement: Agreement | None = None

    def mean(self, attribute: str) -> float:
        """The mean of a ``LayerFidelity`` attribute over the layers."""
        return sum(getattr(layer, attribute) for layer in self.layers) / max(len(self.layers), 1)

    @property
    def retained(self) -> float:
        """The share of all deltas that is still there, each layer counting by its delta's square; 1 of none."""
        return share_of(self.layers, "retained")

    @property
    def kept(self) -> float:
        """The same of what is left in the layers' outputs, where the moments of their inputs are known."""
        return share_of(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the model."""
        return {
            "into": self.into,
            "adapters": list(self.adapters),
            "weights": dict(self.weights),
            "base": self.base,
            "base_losses": dict(self.base_losses),
            "rounding": self.rounding,
            "residual_rank": self.residual_rank,
            "trained": self.trained,
            "retained": self.retained,
            "kept": self.kept,
            "layers": [asdict(layer) for layer in self.layers],
            "agreement": None if self.agreement is None else asdict(self.agreement),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_dict()`` to the file ``path`` as JSON."""
        write_text_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw every layer's delta, rounding error and retained share into the picture ``path``."""
        into = "each module's own storage" if self.into == "same" else self.into
        plot(
            self.layers, f"{len(self.layers)} layers merged into {into}: {self.kept:.1%} of the delta kept", Path(path)
        )

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
            f"{len(self.layers)} layers merged into {storage}: {self.retained:.1%} of the delta retained, "
            f"mean error {self.mean('error'):.2e}"
        )
        if self.residual_rank:
            lines[-1] += f", a residual adapter of rank {self.residual_rank} attached"
        if self.trained:
            lines.append(TRAINED)
        if any(layer.arrived is not None for layer in self.layers):
            lines.append(f"{self.kept:.1%} of it in the layers' outputs, by the second moments of their inputs")
        if self.base_losses:
            losses = ", ".join(f"{name} {loss:.4f}" for name, loss in self.base_losses.items())
            lines.append(f"merged into the {self.base} base (loss on the text: {losses})")
        elif self.base != "dequantized":
            lines.append(f"merged into the {self.base} base")
        if self.agreement is not None:
            lines.append(str(self.agreement))
        return "\n".join(lines)
