"""``loftq``: the command line. Each command's work is an importable function; nothing is computed here."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Optional

import typer

from qlora_kit.cli.group import command_group, in_words_of, names_or_pattern
from qlora_kit.cli.numbers import gigabytes, parse_bytes, size_or_word, whole_numbers
from qlora_kit.codecs.codebooks import STORED_TYPES
from qlora_kit.config.loftq import AUTO
from qlora_kit.config.lora import LoftQConfig, LoraConfig
from qlora_kit.distributed.team import PATIENCE
from qlora_kit.errors import ConfigError

_GO_ON = "what is finished is kept: the same command goes on from there"

app = command_group(
    "loftq",
    "Quantize a model and start its adapters together, a tensor at a time, from folder to folder.",
    resumed={"init": _GO_ON},
)
# Panels of the help of ``init``. Each has columns as wide as its own options need: in one panel the longest option
# leaves the others no room for their names at 80 columns.
_SWITCHES, _BUDGET, _CALIBRATION, _RUN = "Switches", "Bits under a budget", "Calibration", "The run itself"
OutFolder = Annotated[Path, typer.Argument(help="What loftq init wrote.", show_default=False)]


@app.command()
def init(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="Folder, or name on the Hub, of the 16-bit model.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the quantized model and its adapter go.", show_default=False)],
    # typer evaluates these annotations, and on Python 3.10 it wants Optional spelled out.
    bits: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="2, 3, 4 or 8; a mean between them chooses each layer's. Default: 4."),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="The most alternations.")] = 5,
    alpha: Annotated[Optional[float], typer.Option(help="lora_alpha. Default: the rank.")] = None,  # noqa: UP045
    rslora: Annotated[bool, typer.Option(rich_help_panel=_SWITCHES, help="Scale by alpha / sqrt(rank).")] = False,
    quant_type: Annotated[Optional[str], typer.Option(help="nf4, signed2, affine3, trellis2, ...")] = None,  # noqa: UP045
    blocksize: Annotated[str, typer.Option(help="Weights that share a scale, or row.")] = "64",
    double_quant: Annotated[bool, typer.Option(rich_help_panel=_SWITCHES, help="Keep the scales in 8 bits.")] = False,
    targets: Annotated[str, typer.Option(help="all-linear, names with commas between, or a regex.")] = "all-linear",
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(rich_help_panel=_BUDGET, help="Bytes of model and adapters, 4GiB say, to fit in."),
    ] = None,
    ranks: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(rich_help_panel=_BUDGET, help="Ranks to choose from under a budget: 8,16,32."),
    ] = None,
    allocation: Annotated[
        str, typer.Option(rich_help_panel=_BUDGET, help="Under a budget: milp, or first-layers (4 bits, then 2).")
    ] = "milp",
    method: Annotated[str, typer.Option(help="loftq, qera-diag, qera, pissa, srr, cloq, aligned, or auto.")] = "auto",
    calibration: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            rich_help_panel=_CALIBRATION,
            help="Text to look at the inputs with: a file, builtin, or none. Default: builtin if needed.",
        ),
    ] = None,
    calibration_rows: Annotated[
        int, typer.Option(min=1, rich_help_panel=_CALIBRATION, help="Rows to cut from the text.")
    ] = 128,
    calibration_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=_CALIBRATION, help="Tokens of a row.")
    ] = 512,
    activations: Annotated[
        str, typer.Option(rich_help_panel=_CALIBRATION, help="Memory for activations; more goes to the disk.")
    ] = "2GiB",
    scale_search: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--scale-search/--no-scale-search",
            rich_help_panel=_SWITCHES,
            help="Search each block's scale. Default: as the method.",
        ),
    ] = None,
    adapter_aware: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--adapter-aware/--no-adapter-aware",
            rich_help_panel=_SWITCHES,
            help="Round so that the adapter takes most of the error back. Default: as the method.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=_RUN, help="Of the decomposition's random start.")] = 0,
    device: Annotated[
        str, typer.Option(rich_help_panel=_RUN, help="cpu, cuda, or auto: all GPUs, or the CPU if there is none.")
    ] = "auto",
    workers: Annotated[
        int, typer.Option(min=1, rich_help_panel=_RUN, help="Tensors worked on at a time; more take more memory.")
    ] = 1,
    patience: Annotated[
        float,
        typer.Option(min=1, rich_help_panel=_RUN, help="Under torchrun: seconds without a sign of another process."),
    ] = PATIENCE,
    shard_size: Annotated[float, typer.Option(min=0.001, rich_help_panel=_RUN, help="GB a shard of the output.")] = 5.0,
) -> None:
    """Quantize MODEL into OUT, with OUT/loftq_init as its adapter. Stopped anywhere, the same command goes on.

    Several processes of a machine, or of machines with one file system, share the work, to the same bytes:
    torchrun --nproc-per-node=8 -m loftq init ...
    """
    from qlora_kit.checkpoints.model_folder import locate
    from qlora_kit.distributed.joining import joined

    from .bits.budget import Budget
    from .disk.devices import devices_for
    from .disk.progress import bar
    from .disk.stream import Task, stream

    renamed = {
        "source": "model",
        "r": "rank",
        "lora_alpha": "alpha",
        "use_rslora": "rslora",
        "target_modules": "targets",
        "loftq_bits": "bits",
        "loftq_iter": "steps",
        "rule": "allocation",
        "shard_bytes": "GB shard_size",
        "activation_bytes": "activations",
    }
    with (
        in_words_of("loftq init", context, Task, LoraConfig, LoftQConfig, Budget, **renamed) as words,
        joined(patience, go_on=_GO_ON) as team,
    ):
        if allocation not in ("milp", "first-layers"):
            raise ConfigError(
                f"--allocation: expected milp or first-layers, found {allocation!r}; leave it out for milp"
            )
        budget = None
        if memory is not None:
            budget = Budget(bits, parse_bytes(memory, "--memory"), whole_numbers(ranks, "--ranks"), allocation)
        elif ranks is not None or allocation != "milp" or bits not in (None, 2, 3, 4, 8):
            budget = Budget(4 if bits is None else bits, None, whole_numbers(ranks, "--ranks"), allocation)
        lora = LoraConfig(
            r=rank,
            lora_alpha=rank if alpha is None else alpha,
            use_rslora=rslora,
            target_modules=names_or_pattern(targets),
            init_lora_weights="loftq",
            loftq_config=LoftQConfig(
                loftq_bits=_bits(quant_type) if budget is not None or bits is None else int(bits),
                loftq_iter=steps,
                quant_type=quant_type,
                blocksize=size_or_word(blocksize) or "",
                double_quant=double_quant,
                method=method,
                seed=seed,
                calibration={None: AUTO, "none": None}.get(calibration, calibration),
                calibration_rows=calibration_rows,
                calibration_tokens=calibration_tokens,
                scale_search=scale_search,
                adapter_aware=adapter_aware,
            ),
        )
        devices = devices_for(device, team)
        task = Task(
            Path(team.from_rank(str(locate(model)) if team.leads else "")),  # fetched from the Hub once
            out,
            lora,
            gigabytes(shard_size, "--shard-size"),
            devices[0],
            workers,
            outputs=calibration not in (None, "none"),
            budget=budget,
            activation_bytes=parse_bytes(activations, "--activations"),
            devices=devices,
        )
        with bar() if team.leads else nullcontext() as progress:
            report = stream(task, progress=progress, team=team)
        if team.leads:
            typer.echo(words(str(report)))
    if not team.leads:
        return
    less = f"; {len(report.lowered)} layers have a smaller rank, see above" if report.lowered else ""
    warning = f"; {report.alarm}" if report.alarm else ""
    typer.echo(f"wrote {out}, a model for from_pretrained, and its adapter {out / 'loftq_init'}{less}{warning}")


@app.command()
def report(context: typer.Context, out: OutFolder) -> None:
    """Print the table of a finished run again."""
    from .starts.report import Report

    with in_words_of("loftq report", context, Report.load) as words:
        typer.echo(words(str(Report.load(out))))


@app.command("distill")
def distill_(
    context: typer.Context,
    out: OutFolder,
    against: Annotated[str, typer.Option(help="The 16-bit model that OUT was made from.", show_default=False)],
    calibration: Annotated[str, typer.Option(help="Text to learn on: a file, or builtin.")] = "builtin",
    calibration_rows: Annotated[int, typer.Option(min=2, help="Rows to cut from the text.")] = 128,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 512,
    passes: Annotated[float, typer.Option(help="How often the text is gone through.")] = 2.0,
    learning_rate: Annotated[float, typer.Option(help="The highest of the run.")] = 3e-4,
    batch_rows: Annotated[int, typer.Option(min=1, help="Rows of a step.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the rows' order.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Have OUT's adapter learn from the original, end to end, into OUT/loftq_distilled. The start stays.

    Text that the start hasn't looked at teaches more than the same again. One row in sixteen is held out to see what is
    gained; where that is nothing, nothing is written.
    """
    from qlora_kit.distributed.team import ALONE

    from .disk.devices import devices_for
    from .disk.distilled import DISTILLED_FOLDER, distill_folder
    from .disk.progress import steps_bar

    renamed = {"text": "calibration", "labels": "against"}  # whose labels they are
    with in_words_of("loftq distill", context, distill_folder, LoraConfig, LoftQConfig, **renamed):
        with steps_bar() as progress:
            found = distill_folder(
                out,
                against,
                calibration,
                rows=calibration_rows,
                tokens=calibration_tokens,
                device=devices_for(device, ALONE)[0],
                passes=passes,
                learning_rate=learning_rate,
                batch_rows=batch_rows,
                seed=seed,
                progress=progress,
            )
        typer.echo(str(found))
    typer.echo(f"wrote {out / DISTILLED_FOLDER}, an adapter of {out}" if found.kept else "nothing was written")


@app.command()
def verify(
    context: typer.Context,
    out: OutFolder,
    against: Annotated[Optional[str], typer.Option(help="The 16-bit model, to measure errors again.")] = None,  # noqa: UP045
    layers: Annotated[int, typer.Option(min=1, help="How many layers to measure again.")] = 8,
    load: Annotated[bool, typer.Option("--load/--no-load", help="Load and run it too, as transformers does.")] = True,
) -> None:
    """Check that OUT's quantized model and adapter belong together, that it loads, and that its report is true."""
    from .disk.verify import verify as check

    with in_words_of("loftq verify", context, check, LoraConfig, LoftQConfig):
        for line in check(out, against, layers=layers, load=load):
            typer.echo(line)


def _bits(quant_type: str | None) -> int:
    """Of that type; 4 where none or no type is named."""
    return int(quant_type[-1]) if quant_type in STORED_TYPES else 4
