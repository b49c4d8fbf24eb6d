"""``qlora-kit``: the command line. Each command's work is an importable function; nothing is computed here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from ..errors import ConfigError
from .group import command_group, in_words_of, names_or_pattern
from .numbers import gigabytes, parse_bytes, size_or_word

app = command_group(
    "qlora-kit",
    "Low-rank adapters on quantized models: start, train, save, merge, with the numbers shown.",
    resumed={
        "merge": "what is finished is kept: the same command goes on from there",
        "demo": "give the same command again, which begins anew",
    },
)


@app.command()
def demo(
    context: typer.Context,
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
    from ..demo import Settings, run_demo, show, write_reports  # transformers, only for those who need it

    with in_words_of("qlora-kit demo", context, Settings):
        settings = Settings.make(
            model=model, out=out, steps=steps, rank=rank, learning_rate=learning_rate, seed=seed, device=device
        )
        result = run_demo(settings)
    show(result)
    for path in write_reports(result, out):
        typer.echo(f"wrote {path}")


@app.command()
def combine(
    context: typer.Context,
    sources: Annotated[
        list[str], typer.Argument(help="Adapters' folders and weights: DIR=0.7 DIR2=0.3", metavar="DIR=WEIGHT...")
    ],
    out: Annotated[Path, typer.Option(help="Where the combined adapter goes.", show_default=False)],
    kind: Annotated[str, typer.Option("--type", help="svd, exact, cat, ties, dare_linear, knots, iso_c, ...")] = "svd",
    rank: Annotated[Optional[int], typer.Option(help="Of the result. Default: the sources' largest, or all.")] = None,  # noqa: UP045
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead of --rank, for svd and exact: the share of the sum to keep in each module."),
    ] = None,
    density: Annotated[Optional[float], typer.Option(help="Share of entries that pruning keeps.")] = None,  # noqa: UP045
    majority_sign: Annotated[str, typer.Option(help="How TIES elects: total or frequency.")] = "total",
    seed: Annotated[int, typer.Option(min=0, help="Of DARE's masks.")] = 0,
    own_ranks: Annotated[
        bool, typer.Option("--own-ranks", help="Let each module keep its rank; servers need one rank for all.")
    ] = False,
    any_base: Annotated[bool, typer.Option("--any-base", help="Don't check that the base models are one.")] = False,
) -> None:
    """Combine stored adapters into a new one; the base model isn't needed."""
    from ..folders.combine import combine_folders

    renamed = {
        "folders": "sources",
        "weights": "sources",
        "combination_type": "kind",
        "svd_rank": "rank",
        "majority_sign_method": "majority_sign",
        "check_backbone": "not any_base",
    }
    with in_words_of("qlora-kit combine", context, combine_folders, **renamed) as words:
        folders, weights = zip(*map(_weighted, sources), strict=True)
        report = combine_folders(
            folders,
            weights,
            out,
            kind,
            rank,
            density=density,
            majority_sign_method=majority_sign,
            energy=energy,
            seed=seed,
            own_ranks=own_ranks,
            check_backbone=not any_base,
        )
        typer.echo(words(str(report)))
    typer.echo(f"wrote {out}")


@app.command()
def compress(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The adapter's folder.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the smaller adapter goes.", show_default=False)],
    rank: Annotated[Optional[int], typer.Option(help="Of every module, where it isn't lower already.")] = None,  # noqa: UP045
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead of --rank: the share of each module's delta to keep, 0.99 say."),
    ] = None,
    own_ranks: Annotated[
        bool, typer.Option("--own-ranks", help="Let each module keep its rank; servers need one rank for all.")
    ] = False,
) -> None:
    """Lower a stored adapter's ranks, and show what it costs; the base model isn't needed."""
    from ..folders.combine import compress_folder

    with in_words_of("qlora-kit compress", context, compress_folder) as words:
        report = compress_folder(folder, out, rank, energy=energy, own_ranks=own_ranks)
        typer.echo(words(str(report)))
    typer.echo(f"wrote {out}")


@app.command()
def merge(
    context: typer.Context,
    base: Annotated[str, typer.Option(help="Folder of the model, or its name on the Hub.", show_default=False)],
    adapter: Annotated[list[str], typer.Option(help="An adapter's folder; once for each.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the merged model goes.", show_default=False)],
    weight: Annotated[
        Optional[list[float]],  # noqa: UP045
        typer.Option(help="What an adapter's delta is multiplied by, once for each. Default: 1."),
    ] = None,
    into: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="bfloat16, float16, float32, same, or a k-bit type: nf4, fp4, int8, nf3, nf2, trellis2, ... Default: "
            "what the adapters are trained to be merged into, or bfloat16."
        ),
    ] = None,
    rounding: Annotated[str, typer.Option(help="Of k-bit weights: nearest or scale-search.")] = "nearest",
    blocksize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of a k-bit type: a number, or row. Default: the module's own if it is of that type, or 64."),
    ] = None,
    double_quant: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--double-quant/--single-quant", help="Scales of a k-bit type in 8 bits. Default: as blocksize."),
    ] = None,
    shard_size: Annotated[float, typer.Option(min=0.001, help="GB after which a file of the output ends.")] = 5.0,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Don't check that the base is the one that the adapter was started on.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Round to few bits even if that loses most of the delta.")
    ] = False,
    tokenizer: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder of the tokenizer and chat template for the output. Default: the base's."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
) -> None:
    """Merge stored adapters into a stored model, a tensor at a time; stopped at any point, the same command goes on."""
    from ..folders.merge.run import merge_folders

    renamed = {
        "adapters": "adapter",
        "weights": "weight",
        "shard_bytes": "GB shard_size",
        "check_backbone": "not any_base",
    }
    with in_words_of("qlora-kit merge", context, merge_folders, **renamed) as words:
        report = merge_folders(
            base,
            adapter,
            out,
            weights=weight,
            into=into,
            rounding=rounding,
            blocksize=size_or_word(blocksize),
            double_quant=double_quant,
            shard_bytes=gigabytes(shard_size, "--shard-size"),
            check_backbone=not any_base,
            force=force,
            device=device,
            tokenizer=tokenizer,
            progressbar=True,
        )
        typer.echo(words(str(report)))
    typer.echo(f"wrote {out}")


@app.command()
def extract(
    context: typer.Context,
    base: Annotated[str, typer.Option(help="The model before: a folder, or a name on the hub.", show_default=False)],
    tuned: Annotated[str, typer.Option(help="The same model after tuning.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the adapter goes.", show_default=False)],
    rank: Annotated[Optional[int], typer.Option(help="Of every module, 32 say.")] = None,  # noqa: UP045
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Instead of --rank: the share of each module's difference to keep, 0.9 say."),
    ] = None,
    targets: Annotated[str, typer.Option(help="all-linear, names with commas between, or a regex.")] = "all-linear",
    whole: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Modules to store whole: norm,lm_head say, or changed for all that the ranks can't hold."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the factors: float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    own_ranks: Annotated[
        bool, typer.Option("--own-ranks", help="Let each module keep its rank; servers need one rank for all.")
    ] = False,
) -> None:
    """Turn the difference of two checkpoints into the best adapter there is, and show what it holds and leaves out."""
    from ..folders.extract.run import extract_folders

    with in_words_of("qlora-kit extract", context, extract_folders, target_modules="targets") as words:
        report = extract_folders(
            base,
            tuned,
            out,
            rank,
            energy=energy,
            target_modules=names_or_pattern(targets),
            whole=whole if whole in (None, "changed") else [name.strip() for name in whole.split(",")],
            dtype=dtype,
            device=device,
            own_ranks=own_ranks,
        )
        typer.echo(words(str(report)))
    typer.echo(f"wrote {out}")


@app.command()
def plan(
    context: typer.Context,
    model: Annotated[
        str, typer.Option(help="A folder, or a name on the hub, of which config.json is read.", show_default=False)
    ],
    bits: Annotated[int, typer.Option(help="Of the linear layers: 16, 8, 4, 3 or 2.")] = 4,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    seq: Annotated[int, typer.Option(help="Tokens a row.")] = 2048,
    batch: Annotated[int, typer.Option(help="Rows at a time.")] = 1,
    gpu: Annotated[Optional[str], typer.Option(help="What it has to fit on: t4, l4, 4090, a100, h100, ...")] = None,  # noqa: UP045
    memory: Annotated[Optional[str], typer.Option(help="Instead of --gpu, or of what that has: 12GiB.")] = None,  # noqa: UP045
    targets: Annotated[str, typer.Option(help="all-linear, names with commas between, or a regex.")] = "all-linear",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw-8bit, paged-adamw, paged-adamw-8bit, lion, adafactor, sgd, ...")
    ] = "adamw",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing/--no-checkpointing", help="Compute activations anew in the backward.")
    ] = True,
    chunked_loss: Annotated[bool, typer.Option("--chunked-loss", help="The loss a few tokens at a time.")] = False,
    attention: Annotated[str, typer.Option(help="sdpa (fused kernels) or eager.")] = "sdpa",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="Of the adapters.")] = "float32",
    dropout: Annotated[float, typer.Option(help="Of the adapters.")] = 0.0,
    accumulation: Annotated[int, typer.Option(help="Batches to a step of the optimizer.")] = 1,
    quant_type: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Instead of --bits: nf4, fp4, nf3, signed2, trellis2, ..."),
    ] = None,
    blocksize: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    double_quant: Annotated[bool, typer.Option("--double-quant/--single-quant", help="Scales in 8 bits.")] = False,
    merge_aware: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Trained to be merged into this type: nf4, signed2, int8, ..., or same.", metavar="TYPE"),
    ] = None,
    world_size: Annotated[int, typer.Option(help="GPUs that share the run; the plan is of one.")] = 1,
    engine: Annotated[str, typer.Option(help="How they do: ddp, fsdp2, zero2, zero3 or tp.")] = "ddp",
    compare: Annotated[bool, typer.Option("--compare", help="The peak at every number of bits too.")] = False,
    json: Annotated[Optional[Path], typer.Option(help="Write the plan to this file too.")] = None,  # noqa: UP045
) -> None:
    """Tell what memory a training run takes, part by part, and whether it fits; no weights are downloaded."""
    from ..training.planner import Settings, plan_memory

    renamed = {"target_modules": "targets", "lora_dropout": "dropout"}
    with in_words_of("qlora-kit plan", context, plan_memory, Settings, **renamed) as words:
        found = plan_memory(
            model,
            gpu=gpu,
            memory=None if memory is None else parse_bytes(memory, "--memory"),
            compare=compare,
            bits=bits,
            rank=rank,
            seq=seq,
            batch=batch,
            targets=targets if isinstance(names := names_or_pattern(targets), str) else tuple(names),
            optimizer=optimizer,
            checkpointing=checkpointing,
            chunked_loss=chunked_loss,
            attention=attention,
            dtype=dtype,
            adapter_dtype=adapter_dtype,
            dropout=dropout,
            accumulation=accumulation,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            merge_aware=merge_aware,
            world_size=world_size,
            engine=engine,
        )
        typer.echo(words(str(found)))
        if json is not None:
            found.save(json)
    if json is not None:
        typer.echo(f"wrote {json}")


def _weighted(source: str) -> tuple[str, float]:
    """``"DIR=0.7"`` as a folder and its weight."""
    folder, _, weight = source.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        folder = ""
    if not folder:
        raise ConfigError(f"{source}: expected a folder and its weight, found another text; pass DIR=0.7, say")
    return folder, number
