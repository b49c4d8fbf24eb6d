"""``qlora-kit``: the command line. Each command's work is an importable function; nothing is computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from . import __version__
from .errors import QLoRAKitError

app = typer.Typer(
    help="Low-rank adapters on quantized models: start, train, save, merge, with the numbers shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Keeps ``qlora-kit`` a group of commands, of which there may be one."""


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

    try:
        settings = Settings.make(
            model=model, out=out, steps=steps, rank=rank, learning_rate=learning_rate, seed=seed, device=device
        )
        result = run_demo(settings)
    except QLoRAKitError as error:
        typer.secho(f"qlora-kit demo: {error}", err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from error
    show(result)
    for path in write_reports(result, out):
        typer.echo(f"wrote {path}")
