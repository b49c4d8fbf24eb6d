"""How much of a model's quality does each start keep, before and after the same short fine-tune?

On trained language models: perplexity of held-out text of torch's sources, at 16 bits and at 4, 3, 2.5, 2.25 and 2 bits
(mean bits of a code; scales in 8 bits, blocks of 64), from every start; then after 40 steps of 4 x 256 tokens, with
several seeds (order of the text; for a zero start also A). Calibration text is what every Python brings along, apart
from both. "nf" rows have the published NormalFloat tables, all others the default types. At 2.5 and 2.25 bits each
method's own allocation is used, or with "rule" the first layers get 4 bits and the rest 2.

The folder of ``real_models`` has rows and texts of its own: English news, measured on 16 rows; unless the row says
otherwise calibrated on 32 other rows of the same domain, which is more than a user may have: the rows "on code", "on
news and code" and "built-in text" have other domains. Before any fine-tune code is measured on 16 rows too. peft's
LoftQ runs on CUDA only; "loftq T=5, nf" is its loop at scaling 1, best iterate kept. Of every start there are seconds
(of wall clock, the allocation of bits included; then of processors) and the process's peak of resident memory while it
is made, model included, on Linux.

On MiniLM: the output's relative error and the mean cosine of sentence embeddings.

Run: python benchmarks/quality.py --state FILE [--models DIR ...] [--bits 2 ...] [--rank 16] [--seeds 3]
    [--learning-rate 1e-3] [--steps 40] [--minilm]
With --seeds 0 nothing is fine-tuned, and a later call with more seeds fills that in for the rows that it names.
A run that is cut off goes on from FILE; "--table" only prints what it holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
import transformers
from minilm import MiniLM
from quality_rows import REAL_STARTS, STARTS, Start, lora_config
from real_models import is_real, texts, windows_of
from torch import Tensor, nn

from loftq import allocate, distill, soft_labels
from qlora_kit import LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training
from qlora_kit.demo.models import Source, quiet, reference_model_path
from qlora_kit.demo.settings import Settings
from qlora_kit.demo.text import Windows
from qlora_kit.demo.training import fine_tune_, perplexity

BITS = (2.0, 2.25, 2.5, 3.0, 4.0)
# Perplexity is to be so much above that of 16 bits, as a share of it, for shares of the difference to say something.
_LEAST_GAP = 0.02
_HEADS = {"MiniLM": "output error | cosine", "model": "before (code) | after | gaps | cost"}
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class State:
    """Results by model, bits, rank and start; kept in a file after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def at(self, *key: object) -> dict[str, Any]:
        return self.found.setdefault(" | ".join(map(str, key)), {"after": {}})

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def started(
    start: Start, bits: float, rank: int, model: nn.Module, own: Mapping[str, Tensor] | None = None
) -> LoraModel:
    """``model`` from that start; a zero start has the plainly quantized weights that LoftQ's first step makes."""
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if bits == 16:
        return apply_lora(model, LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    config = lora_config(start, bits, rank, own)
    labels = soft_labels(model, config.loftq_config.calibration) if start.distilled and config.loftq_config else None
    if bits != int(bits):
        config = allocate(model, config, bits=bits, rule=start.rule).config
    lora = apply_lora(model, config)
    if start.zero:
        zero_(lora, 0)
    if labels is not None:
        print(distill(lora, labels), flush=True)
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
    start: Start,
    bits: float,
    rank: int,
    folder: str,
    windows: Windows,
    own: Mapping[str, Tensor] | None,
    state: State,
    options: argparse.Namespace,
) -> None:
    """Fill in one row."""
    row = state.at(Path(folder).name, bits, rank, start.name)
    todo = [seed for seed in range(options.seeds) if str(seed) not in row["after"]]
    if "before" in row and not todo:
        return
    model = Source(folder, "cpu", torch.float32).dense()
    forget_peak()
    began, used = time.monotonic(), time.process_time()
    lora = started(start, bits, rank, model, own)
    del model
    row |= {"seconds": time.monotonic() - began, "processor": time.process_time() - used, "peak": peak()}
    row["before"] = perplexity(lora, windows.held_out)
    if own is not None:
        row["code"] = perplexity(lora, own["other_test"])
    state.save()
    kept = {name: p.detach().clone() for name, p in lora.named_parameters() if p.requires_grad}
    for seed in todo:
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
        if (start.zero and not start.distilled) or bits == 16:
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


def forget_peak() -> None:
    """Have the peak of resident memory begin anew, where the system lets a process do that."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak() -> int | None:
    """Bytes, since ``forget_peak``; None where there is no such thing."""
    if not _CLEAR.exists():
        return None
    return next(1024 * int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))


def text(row: dict[str, Any]) -> str:
    after = list(row["after"].values())
    spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
    code = f" ({row['code']:.2f})" if "code" in row else ""
    return f"{row['before']:.2f}{code} | " + (f"{statistics.mean(after):.2f}{spread}" if after else "")


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
        heads = [f"{m}: {_HEADS['MiniLM' if m == 'MiniLM' else 'model']}" for m in models]
        print(f"| start | {' | '.join(heads)} |\n| --- |{' ---: |' * ' | '.join(heads).count('|')} ---: |")
        for name in dict.fromkeys(start.name for start in (*STARTS, *REAL_STARTS)):
            if any(name in found for found in models.values()):
                cells = [_cells(m, found, name, rows.get((16.0, rank), {}).get(m)) for m, found in models.items()]
                print(f"| {name} | {' | '.join(cells)} |")


def _cells(model: str, found: dict[str, Any], name: str, full: dict[str, Any] | None) -> str:
    row = found.get(name)
    if model == "MiniLM":
        return f"{row['error']:.4f} | {row['cosine']:.4f}" if row else " | "
    if not row:
        return " | | | "
    cost = f"{row['seconds']:.0f} s" if "seconds" in row else ""
    cost += f", {row['processor']:.0f} s" if "processor" in row else ""
    cost += f", {row['peak'] / 1e9:.1f} GB" if row.get("peak") else ""
    against = found.get("loftq T=5, nf") or found.get("loftq T=5")
    if full is None or against is None:
        return f"{text(row)} | | {cost}"
    pairs = [(r["before"], statistics.mean(r["after"].values()) if r["after"] else None) for r in (row, against)]
    tuned = full["zero"]["after"].values()
    ends = full["zero"]["before"], statistics.mean(tuned) if tuned else None
    return f"{text(row)} | {', '.join(_share(*gap) for gap in zip(*pairs, ends, strict=True))} | {cost}"


def _share(own: float | None, other: float | None, full: float | None) -> str:
    if own is None or other is None or full is None or other - full < _LEAST_GAP * full:
        return "-"
    return f"{(own - full) / (other - full):.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference = reference_model_path()
    parser.add_argument("--state", type=Path, required=True, help="where results are kept")
    parser.add_argument("--models", nargs="*", default=[str(reference), str(reference.parent / "second_lm")])
    parser.add_argument("--bits", nargs="*", type=float, default=list(BITS))
    parser.add_argument("--rank", nargs="*", type=int, default=[16])
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
            for rank in args.rank:
                minilm(state, rank)
    elif not args.table:
        with quiet():
            for rank, bits, folder in itertools.product(args.rank, (16.0, *args.bits), args.models):
                tokenizer = Source(folder, "cpu", torch.float32).tokenizer()
                windows = windows_of(folder, tokenizer, train_rows=4 * args.steps)
                own, starts = None, STARTS
                if is_real(folder):
                    found = texts(tokenizer)
                    mixed = torch.stack([found.calibration, found.other_calibration], 1).flatten(0, 1)
                    own = {"own": found.calibration, "other": found.other_calibration, "mixed": mixed}
                    own["other_test"] = found.other_test
                    starts = REAL_STARTS
                for start in starts:
                    if (bits == 16 and start.name != "zero") or (start.bits and bits not in start.bits):
                        continue
                    if bits == 16 or not args.starts or start.name in args.starts:
                        measure(start, bits, rank, folder, windows, own, state, args)
    print_tables(state)


if __name__ == "__main__":
    main()
