"""A merge as a picture: how large each layer's delta is beside the rounding of its storage, and how much of it was
kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .fidelity import LayerFidelity

# A report without losses has errors of 0, which a log axis can't show.
_LEAST = 1e-6


def plot(merged: Sequence[LayerFidelity], title: str, path: Path) -> None:
    """Write the picture of ``merged`` layers to ``path``, whose ending says the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    sizes, kept = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    layers = range(len(merged))
    deltas = [max(layer.delta_ratio, _LEAST) for layer in merged]
    errors = [max(layer.error, _LEAST) for layer in merged]
    sizes.vlines(layers, errors, deltas, color="0.85", zorder=0)
    sizes.plot(layers, deltas, "o", ms=4, color="C0", label="delta / weight")
    sizes.plot(layers, errors, "o", ms=4, color="C3", label="rounding error / weight")
    sizes.set_yscale("log")
    sizes.set_ylim(min([*deltas, *errors, 1]) / 2, max([*deltas, *errors, _LEAST]) * 2)
    sizes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    sizes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    sizes.yaxis.set_minor_formatter(NullFormatter())
    sizes.set_ylabel("relative to ||W||")
    sizes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
    kept.axhline(100, color="0.6", lw=0.8, ls=":")
    shares = [100 * layer.retained for layer in merged]
    kept.plot(layers, shares, "o", ms=4, color="C0", label="in the weight")
    if any(layer.arrived is not None for layer in merged):
        outputs = [100 * layer.kept for layer in merged]
        kept.plot(layers, outputs, "o", ms=4, mfc="none", color="C2", label="in the output")
        kept.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)
        shares = shares + outputs
    kept.set_ylim(min([0.0, *shares]) - 5, max([100.0, *shares]) + 5)
    kept.xaxis.set_major_locator(MaxNLocator(integer=True))
    kept.set_ylabel("delta kept, %")
    kept.set_xlabel("layer, in the order of the model")
    figure.suptitle(title)
    for axes in (sizes, kept):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None} if path.suffix == ".png" else None)
