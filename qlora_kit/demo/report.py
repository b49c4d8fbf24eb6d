"""Showing the result: tables on the terminal, a plot, and every number as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..checkpoints.files import write_atomically
from .results import FineTune, Result

COLOURS = {"zero start": "#8c8c8c", "LoftQ start": "#1f6fb2", "calibrated start": "#2a8c4a"}
STARTS = {"zero start": "zero (QLoRA)", "LoftQ start": "LoftQ", "calibrated start": "calibrated (aligned)"}
MERGED = "#b2651f"


def show(result: Result, console: Console | None = None) -> None:
    """Print the tables and the generations."""
    console = console or Console()
    console.print(fine_tune_table(result), merge_table(result))
    for generation in result.generations:
        console.print(generation_panel(generation.prompt, generation.continuations))
    text = result.text
    for reload in result.reloads:
        console.print(
            f"Reloaded from {reload.adapter_bytes / 1e6:.2f} MB of adapter and {reload.base_bytes / 1e6:.2f} MB of "
            f"{reload.bits}-bit base: the largest difference of a logit is {reload.largest_difference:.1e}."
        )
    console.print(
        f"Measured on {text['held_out_tokens']:,} held-out tokens of the {text['source']}, on "
        f"{result.environment['processor']}, in {result.seconds:.0f} s."
    )


def fine_tune_table(result: Result) -> Table:
    table = Table(
        title=f"The same {result.settings['steps']}-step fine-tune, rank {result.settings['rank']} "
        f"({result.trainable_parameters:,} trainable parameters)",
        caption=f"16 bits without adapters: perplexity {result.perplexity:.2f}",
    )
    for name in ("base weights", "adapters start from"):
        table.add_column(name)
    for name in ("MB of base", "perplexity before", "after"):
        table.add_column(name, justify="right")
    for run in result.fine_tunes:
        best = run.perplexity_after <= min(r.perplexity_after for r in result.fine_tunes if r.bits == run.bits)
        table.add_row(
            f"{run.bits} bits ({run.storage})",
            STARTS[run.start] if run.bits < 16 else "zero (LoRA)",
            f"{run.base_bytes / 1e6:.2f}",
            f"{run.perplexity_before:,.2f}",
            Text(f"{run.perplexity_after:,.2f}", style="bold" if best else ""),
        )
    return table


def loftq_at_4_bits(result: Result) -> FineTune:
    """The run whose adapter was saved and merged."""
    return next(run for run in result.fine_tunes if run.bits == 4 and run.start == "LoftQ start")


def merge_table(result: Result) -> Table:
    kept = loftq_at_4_bits(result)
    table = Table(
        title="The 4-bit LoftQ adapter, merged", caption=f"not merged: perplexity {kept.perplexity_after:.2f}"
    )
    table.add_column("into")
    for name in ("perplexity", "delta retained", "weight error", "MB of weights"):
        table.add_column(name, justify="right")
    for way in result.merges:
        table.add_row(
            way.into,
            f"{way.perplexity:.2f}",
            f"{way.retained:.1%}",
            f"{way.error:.1e}",
            f"{way.weight_bytes / 1e6:.1f}",
        )
    return table


def generation_panel(prompt: str, continuations: dict[str, str]) -> Panel:
    parts = [Text(prompt.rstrip("\n"), style="dim")]
    for name, text in continuations.items():
        parts += [Text(f"\n{name}", style="bold cyan"), Text(text.strip("\n"))]
    return Panel(Group(*parts), title="greedy continuations", title_align="left")


def write_reports(result: Result, out: Path) -> list[Path]:
    """``demo.json`` and ``demo.png`` in ``out``; their paths."""
    numbers, picture = out / "demo.json", out / "demo.png"
    write_atomically(numbers, (json.dumps(result.to_dict(), indent=1) + "\n").encode())
    plot(result, picture)
    return [numbers, picture]


def plot(result: Result, path: Path) -> None:
    """Perplexity before and after at each width, and after each merge; one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_fine_tunes(left, result)
    _draw_merges(right, result)
    for axes in (left, right):
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    name = Path(result.settings["model"]).name
    figure.suptitle(f"qlora-kit demo: {name}, {result.parameters:,} parameters", fontsize=12)
    figure.savefig(path, dpi=120)


def _draw_fine_tunes(axes: Any, result: Result) -> None:
    """One row a start, an arrow from before to after. Points, not bars: a log axis has no zero to stand on."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    for row, run in enumerate(result.fine_tunes):
        colour, before, after = COLOURS[run.start], run.perplexity_before, run.perplexity_after
        axes.annotate("", (after, row), (before, row), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.5})
        axes.plot(before, row, "o", markersize=8, markerfacecolor="white", markeredgecolor=colour)
        axes.plot(after, row, "o", markersize=8, color=colour)
        ends = sorted([(before, f"{before:,.2f}"), (after, f"{after:,.2f}")])
        for (x, note), offset, side in zip(ends, (-9, 9), ("right", "left"), strict=True):
            axes.annotate(note, (x, row), (offset, 0), textcoords="offset points", ha=side, va="center", fontsize=9)
    axes.axvline(result.perplexity, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(result.fine_tunes)),
        [f"{run.bits} bits, {run.start}" for run in result.fine_tunes],
    )
    axes.set_ylim(-0.6, len(result.fine_tunes) - 0.4)
    axes.set_xscale("log")
    axes.margins(x=0.18)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("perplexity on held-out text, log scale (lower is better)")
    axes.set_title(
        f"Before (open) and after (filled) the same {result.settings['steps']} steps;\n"
        f"dotted: 16 bits without adapters, {result.perplexity:.2f}",
        fontsize=10,
    )


def _draw_merges(axes: Any, result: Result) -> None:
    kept = loftq_at_4_bits(result)
    names = ["not merged", *(way.into for way in result.merges)]
    values = [kept.perplexity_after, *(way.perplexity for way in result.merges)]
    notes = [f"{values[0]:.2f}", *(f"{w.perplexity:.2f}; {w.retained:.0%} of delta kept" for w in result.merges)]
    bars = axes.barh(names, values, color=[COLOURS["LoftQ start"]] + [MERGED] * len(result.merges))
    axes.bar_label(bars, notes, padding=4, fontsize=9)
    axes.set_xlim(0, max(values) * 1.75)
    axes.set_xlabel("perplexity on held-out text (lower is better)")
    axes.set_title("The 4-bit LoftQ adapter after training, merged", fontsize=10)
