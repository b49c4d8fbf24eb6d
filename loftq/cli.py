"""``loftq``: the command line. Each command's work is an importable function; nothing is computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_kit.command_group import command_group, errors_in_red
from qlora_kit.config import LoftQConfig, LoraConfig

app = command_group("Quantize a model and start its adapters together, a tensor at a time, from folder to folder.")
OutFolder = Annotated[Path, typer.Argument(help="What loftq init wrote.", show_default=False)]


@app.command()
def init(
    model: Annotated[str, typer.Option(help="Folder, or name on the Hub, of the 16-bit model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the quantized model and its adapter go.", show_default=False)],
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="The most alternations.")] = 5,
    # typer evaluates these annotations, and on Python 3.10 it wants Optional spelled out.
    alpha: Annotated[Optional[float], typer.Option(help="lora_alpha. Default: the rank.")] = None,  # noqa: UP045
    rslora: Annotated[bool, typer.Option(help="Scale by alpha / sqrt(rank).")] = False,
    quant_type: Annotated[Optional[str], typer.Option(help="nf4, signed2, affine3, ...")] = None,  # noqa: UP045
    blocksize: Annotated[str, typer.Option(help="Weights that share a scale, or row.")] = "64",
    double_quant: Annotated[bool, typer.Option(help="Keep the scales in 8 bits.")] = False,
    targets: Annotated[str, typer.Option(help="all-linear, names with commas between, or a regex.")] = "all-linear",
    method: Annotated[str, typer.Option(help="How the start is found.")] = "loftq",
    seed: Annotated[int, typer.Option(min=0, help="Of the decomposition's random start.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if there is one.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Tensors worked on at a time; more take more memory.")] = 1,
    shard_size: Annotated[float, typer.Option(min=0.001, help="GB a shard of the output.")] = 5.0,
) -> None:
    """Quantize MODEL into OUT, with OUT/loftq_init as its adapter. Stopped anywhere, the same command goes on."""
    from .checkpoint import check_bits, locate
    from .progress import bar
    from .stream import Task, stream

    with errors_in_red("loftq init"):
        check_bits(bits)
        if targets != "all-linear" and ("," in targets or targets.replace("_", "").isalnum()):
            target_modules: list[str] | str = [name.strip() for name in targets.split(",")]
        else:
            target_modules = targets
        lora = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            use_rslora=rslora,
            target_modules=target_modules,
            init_lora_weights="loftq",
            loftq_config=LoftQConfig(
                loftq_bits=bits,
                loftq_iter=steps,
                quant_type=quant_type,
                blocksize=int(blocksize) if blocksize.isdigit() else blocksize,
                double_quant=double_quant,
                method=method,
                seed=seed,
            ),
        )
        task = Task(locate(model), out, lora, int(shard_size * 1e9), _device(device), workers)
        with bar() as progress:
            report = stream(task, progress=progress)
    typer.echo(str(report))
    typer.echo(f"wrote {out}, a model for from_pretrained, and its adapter {out / 'loftq_init'}")


@app.command()
def report(out: OutFolder) -> None:
    """Print the table of a finished run again."""
    from .report import Report

    with errors_in_red("loftq report"):
        typer.echo(str(Report.load(out)))


@app.command()
def verify(
    out: OutFolder,
    against: Annotated[Optional[str], typer.Option(help="The 16-bit model, to measure errors again.")] = None,  # noqa: UP045
    layers: Annotated[int, typer.Option(min=1, help="How many layers to measure again.")] = 8,
) -> None:
    """Check that OUT's quantized model and adapter belong together, and that its report is true."""
    from .verify import verify as check

    with errors_in_red("loftq verify"):
        for line in check(out, against, layers=layers):
            typer.echo(line)


def _device(name: str) -> str:
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"
