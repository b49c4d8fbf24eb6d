"""``qlora-kit``: the command line. Each command's work is an importable function; nothing is computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .command_group import command_group, errors_in_red

app = command_group("Low-rank adapters on quantized models: start, train, save, merge, with the numbers shown.")


@app.command()
def demo(
    # typer evaluates these annotations, and on Python 3.10 it wants Optional spelled out.
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="A folder, or a name on the hub, of a causal LM. Default: the reference model."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the plot, the numbers and the adapters go.")] = Path("demo_out"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each fine-tune.")] = 60,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, the same for every run.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the adapters' start and the order of the batches.")] = 0,
    device: Annotated[Optional[str], typer.Option(help="cpu or cuda. Default: cuda if there is one.")] = None,  # noqa: UP045
) -> None:
    """Run the whole job on one model: quantize, start, train, save, reload, merge; a table and a plot."""
    from .demo import Settings, run_demo, show, write_reports  # transformers, only for those who need it

    with errors_in_red("qlora-kit demo"):
        settings = Settings.make(
            model=model, out=out, steps=steps, rank=rank, learning_rate=learning_rate, seed=seed, device=device
        )
        result = run_demo(settings)
    show(result)
    for path in write_reports(result, out):
        typer.echo(f"wrote {path}")
