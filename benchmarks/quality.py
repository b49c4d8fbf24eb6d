"""How much of a model's quality does each start keep, before and after the same short fine-tune?

On trained language models: perplexity of held-out text of torch's sources, at 16 bits and at 4, 3, 2.5, 2.25 and 2 bits
(mean bits of a code; scales in 8 bits, blocks of 64), from every start; then after 40 steps of 4 x 256 tokens, with
several seeds (order of the text; for a zero start also A). Calibration text is what every Python brings along, apart
from both. "nf" rows have the published NormalFloat tables, all others the default types. At 2.5 and 2.25 bits each
method's own allocation is used, or with "rule" the first layers get 4 bits and the rest 2.

On MiniLM: the output's relative error and the mean cosine of sentence embeddings.

Run: python benchmarks/quality.py --state FILE [--models DIR ...] [--bits 2 ...] [--rank 16] [--seeds 3]
    [--learning-rate 1e-3] [--minilm]
A run that is cut off goes on from FILE; "--table" only prints what it holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from minilm import MiniLM
from torch import nn

from loftq import allocate
from qlora_kit import LoftQConfig, LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training
from qlora_kit.demo.models import Source, quiet, reference_model_path
from qlora_kit.demo.settings import Settings
from qlora_kit.demo.text import Windows, make_windows
from qlora_kit.demo.training import fine_tune_, perplexity

BITS = (2.0, 2.25, 2.5, 3.0, 4.0)
# Perplexity is to be so much above that of 16 bits, as a share of it, for shares of the difference to say something.
_LEAST_GAP = 0.02
CALIBRATION = {"calibration_rows": 128, "calibration_tokens": 256}


@dataclass(frozen=True)
class Start:
    """A row of the table.

    Attributes:
        name: of the row.
        options: of LoftQConfig.
        zero: quantize plainly and begin with B = 0.
        rule: how bits are allocated where the mean is between two.
        bits: where the row stands; empty is everywhere.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    zero: bool = False
    rule: str = "milp"
    bits: tuple[float, ...] = ()


def _all_starts() -> list[Start]:
    nf: dict[str, Any] = {"quant_type": "nf"}
    return [
        Start("zero, nf (QLoRA)", nf, zero=True, bits=(2, 3)),
        Start("loftq T=1, nf", {**nf, "loftq_iter": 1}, bits=(2, 3)),
        Start("loftq T=5, nf", nf, bits=(2, 3)),
        Start("qera T=5, nf", {**nf, "method": "qera"}, bits=(2, 3)),
        Start("zero", zero=True),
        Start("loftq T=1", {"loftq_iter": 1}),
        Start("loftq T=5"),
        Start("loftq T=5, rule", rule="first-layers", bits=(2.25, 2.5)),
        *(Start(name, {"method": name}) for name in ("qera-diag", "qera", "pissa", "srr", "cloq", "aligned")),
        Start("aligned, rule", {"method": "aligned"}, rule="first-layers", bits=(2.25, 2.5)),
        Start("loftq T=5, searched scales", {"scale_search": True}),
        Start("srr, searched scales", {"method": "srr", "scale_search": True}, bits=(2,)),
        Start("cloq, lloyd", {"method": "cloq", "quant_type": "lloyd"}, bits=(2,)),
        Start("aligned, lloyd", {"method": "aligned", "quant_type": "lloyd"}, bits=(2,)),
    ]


STARTS = _all_starts()


class State:
    """Results by model, bits, rank and start; kept in a file after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def at(self, *key: object) -> dict[str, Any]:
        return self.found.setdefault(" | ".join(map(str, key)), {"after": {}})

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def lora_config(start: Start, bits: float, rank: int) -> LoraConfig:
    options = {"loftq_iter": 1 if start.zero else 5, "double_quant": True, **CALIBRATION, **start.options}
    if "quant_type" in options:
        options["quant_type"] += str(int(bits))
    whole = int(bits) if bits == int(bits) else 4
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=whole, **options),
    )


def started(start: Start, bits: float, rank: int, model: nn.Module) -> LoraModel:
    """``model`` from that start; a zero start has the plainly quantized weights that LoftQ's first step makes."""
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if bits == 16:
        return apply_lora(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    config = lora_config(start, bits, rank)
    if bits != int(bits):
        config = allocate(model, config, bits=bits, rule=start.rule).config
    lora = apply_lora(model, config)
    if start.zero:
        zero_(lora, 0)
    return lora


@torch.no_grad()
def zero_(lora: LoraModel, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in lora.named_parameters():
        if "lora_A" in name:
            nn.init.kaiming_uniform_(parameter, a=5**0.5)
        elif "lora_B" in name:
            nn.init.zeros_(parameter)


def measure(
    start: Start, bits: float, folder: str, windows: Windows, state: State, options: argparse.Namespace
) -> None:
    """Fill in one row."""
    rank = options.rank
    row = state.at(Path(folder).name, bits, rank, start.name)
    todo = [seed for seed in range(options.seeds) if str(seed) not in row["after"]]
    if "before" in row and not todo:
        return
    lora = started(start, bits, rank, Source(folder, "cpu", torch.float32).dense())
    row["before"] = perplexity(lora, windows.held_out)
    kept = {name: p.detach().clone() for name, p in lora.named_parameters() if p.requires_grad}
    for seed in todo:
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
        if start.zero or bits == 16:
            zero_(lora, seed)
        settings = Settings(
            model=folder,
            out=Path(),
            device="cpu",
            steps=options.steps,
            rank=rank,
            seed=seed,
            learning_rate=options.learning_rate,
        )
        fine_tune_(lora, windows.train, settings, title=start.name)
        row["after"][str(seed)] = perplexity(lora, windows.held_out)
    state.save()
    print(f"{Path(folder).name} {bits} bits, rank {rank}, {start.name}: {text(row)}", flush=True)


def text(row: dict[str, Any]) -> str:
    after = list(row["after"].values())
    spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
    return f"{row['before']:.2f} | " + (f"{statistics.mean(after):.2f}{spread}" if after else "")


def minilm(state: State, rank: int) -> None:
    encoder = MiniLM()
    for bits in (2.0, 3.0, 4.0):
        for start in STARTS:
            row = state.at("MiniLM", bits, rank, start.name)
            if (start.bits and bits not in start.bits) or "cosine" in row:
                continue
            row["error"], row["cosine"] = encoder.compare(started(start, bits, rank, encoder.load()))
            state.save()
            print(f"MiniLM {bits} bits, {start.name}: {row['error']:.4f} {row['cosine']:.4f}", flush=True)


def print_tables(state: State) -> None:
    """Markdown, one table for each number of bits, models beside one another. Gaps are to 16 bits, as shares of those
    of LoftQ with T = 5, the published one where it was run; "-" where that has next to none."""
    rows: dict[tuple[float, int], dict[str, dict[str, dict[str, Any]]]] = {}
    for key, row in state.found.items():
        model, bits, rank, name = key.split(" | ")
        rows.setdefault((float(bits), int(rank)), {}).setdefault(model, {})[name] = row
    for (bits, rank), models in sorted(rows.items()):
        print(f"\n{bits:g} bits, rank {rank}\n")
        heads = [f"{m}: {'output error | cosine' if m == 'MiniLM' else 'before | after | gaps'}" for m in models]
        print(f"| start | {' | '.join(heads)} |\n| --- |{' ---: |' * ' | '.join(heads).count('|')} ---: |")
        for start in STARTS:
            if any(start.name in found for found in models.values()):
                cells = [_cells(m, found, start.name, rows.get((16.0, rank), {}).get(m)) for m, found in models.items()]
                print(f"| {start.name} | {' | '.join(cells)} |")


def _cells(model: str, found: dict[str, Any], name: str, full: dict[str, Any] | None) -> str:
    row = found.get(name)
    if model == "MiniLM":
        return f"{row['error']:.4f} | {row['cosine']:.4f}" if row else " | "
    if not row:
        return " | | "
    against = found.get("loftq T=5, nf") or found.get("loftq T=5")
    if full is None or against is None:
        return f"{text(row)} | "
    pairs = [(r["before"], statistics.mean(r["after"].values()) if r["after"] else None) for r in (row, against)]
    ends = full["zero"]["before"], statistics.mean(full["zero"]["after"].values())
    return f"{text(row)} | " + ", ".join(_share(*gap) for gap in zip(*pairs, ends, strict=True))


def _share(own: float | None, other: float | None, full: float) -> str:
    if own is None or other is None or other - full < _LEAST_GAP * full:
        return "-"
    return f"{(own - full) / (other - full):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference = reference_model_path()
    parser.add_argument("--state", type=Path, required=True, help="where results are kept")
    parser.add_argument("--models", nargs="*", default=[str(reference), str(reference.parent / "second_lm")])
    parser.add_argument("--bits", nargs="*", type=float, default=list(BITS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="a state is of one rate and number of steps")
    parser.add_argument("--starts", nargs="*", help="rows to fill in; default: all")
    parser.add_argument("--minilm", action="store_true", help="MiniLM instead of the language models")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    args = parser.parse_args()
    state = State(args.state)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"python {platform.python_version()}, {versions}, bitsandbytes {bitsandbytes.__version__}")
    if args.minilm and not args.table:
        with quiet():
            minilm(state, args.rank)
    elif not args.table:
        with quiet():
            for bits in (16.0, *args.bits):
                for folder in args.models:
                    tokenizer = Source(folder, "cpu", torch.float32).tokenizer()
                    windows = make_windows(tokenizer, window=256, train_rows=4 * args.steps, held_out_rows=32, seed=0)
                    for start in STARTS:
                        if (bits == 16 and start.name != "zero") or (start.bits and bits not in start.bits):
                            continue
                        if bits == 16 or not args.starts or start.name in args.starts:
                            measure(start, bits, folder, windows, state, args)
    print_tables(state)


if __name__ == "__main__":
    main()
