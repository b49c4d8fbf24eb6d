"""Showing the result: tables on the terminal, a plot, and every number as JSON."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..files import write_atomically
from .results import Result

COLOURS = {"zero start": "#8c8c8c", "LoftQ start": "#1f6fb2"}


def show(result: Result, console: Console | None = None) -> None:
    """Print the tables and the generations."""
    console = console or Console()
    console.print(fine_tune_table(result), merge_table(result))
    for generation in result.generations:
        console.print(generation_panel(generation.prompt, generation.continuations))
    reload, text = result.reload, result.text
    console.print(
        f"Reloaded from {reload.adapter_bytes / 1e6:.2f} MB of adapter and {reload.base_bytes / 1e6:.2f} MB of 4-bit "
        f"base: no logit differs by more than {reload.largest_difference:.1e}.\n"
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
    for name in ("perplexity before", "after"):
        table.add_column(name, justify="right")
    for run in result.fine_tunes:
        best = run.perplexity_after <= min(r.perplexity_after for r in result.fine_tunes if r.bits == run.bits)
        table.add_row(
            f"{run.bits} bits ({run.storage})",
            {"zero start": "zero (QLoRA)", "LoftQ start": "LoftQ"}[run.start] if run.bits < 16 else "zero (LoRA)",
            f"{run.perplexity_before:,.2f}",
            Text(f"{run.perplexity_after:,.2f}", style="bold" if best else ""),
        )
    return table


def merge_table(result: Result) -> Table:
    kept = next(run for run in result.fine_tunes if run.bits == 4 and run.start == "LoftQ start")
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
    """Perplexity before and after at each width, and what each merge cost; one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    labels = []
    for place, run in enumerate(result.fine_tunes):
        colour = COLOURS[run.start]
        labels.append(f"{run.bits} bits\n{run.start}")
        left.bar(place - 0.2, run.perplexity_before, 0.38, color=colour, alpha=0.4)
        left.bar(place + 0.2, run.perplexity_after, 0.38, color=colour)
        for x, value in ((place - 0.2, run.perplexity_before), (place + 0.2, run.perplexity_after)):
            left.annotate(f"{value:,.4g}", (x, value), (0, 3), textcoords="offset points", ha="center", fontsize=9)
    left.set_yscale("log")
    left.axhline(result.perplexity, color="black", linewidth=0.8, linestyle=":")
    left.set_xticks(range(len(labels)), labels)
    left.set_ylabel("perplexity on held-out text, log scale (lower is better)")
    left.set_title(
        f"Before (pale) and after (full) the same {result.settings['steps']} steps\n"
        "dotted: 16 bits without adapters; 2 bits are simulated",
        fontsize=10,
    )
    kept = next(run for run in result.fine_tunes if run.bits == 4 and run.start == "LoftQ start")
    ways = [("not merged", kept.perplexity_after), *((way.into, way.perplexity) for way in result.merges)]
    bars = right.barh([name for name, _ in ways], [value for _, value in ways], color=["#1f6fb2"] + ["#b2651f"] * 3)
    notes = [f"{ways[0][1]:.2f}"] + [f"{w.perplexity:.2f}, {w.retained:.0%} of the delta" for w in result.merges]
    right.bar_label(bars, notes, padding=4, fontsize=9)
    right.set_xlim(0, max(value for _, value in ways) * 1.5)
    right.invert_yaxis()
    right.set_xlabel("perplexity on held-out text (lower is better)")
    right.set_title("The 4-bit LoftQ adapter merged three ways", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    name = Path(result.settings["model"]).name
    figure.suptitle(f"qlora-kit demo: {name}, {result.parameters:,} parameters", fontsize=12)
    figure.savefig(path, dpi=120)
