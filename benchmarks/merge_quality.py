"""How much of a fine-tune survives its merge into a quantized base, and at how many bits?

Adapters of rank 16 on all linear layers are trained (``merge_adapters``) on quantized bases: NF4 (bitsandbytes, double
quantization, as QLoRA has it), and the default types of 3 and 2 bits (packed, scales in 8 bits); several learning rates
give several sizes of delta. Each is merged in every way, each time into a fresh copy from the disk, and measured on
text that nothing else looks at: perplexity of a language model, contrastive loss of the sentence encoder.

"kept" is (base - merged) / (base - adapted): the share of the fine-tune's gain that is still there; 100 % is all of
it, and below 0 the merged model is worse than the base without the adapter. Above 100 %: the original weights,
and rounding them with error feedback, are better than the base that the adapter was trained on. "retained" is the share
of the delta along its own direction, ``MergeReport.retained``. "bits" is what the merged linears take a weight, scales
included, and after "+" what the residual branch adds, its factors in bfloat16: 16 r (in + out) / (in out), which is 1
bit for r = 8 at 256 x 256 and 0.06 at 4096 x 4096. Where less than half of the delta is left (``MergeReport.kept``: in
the outputs where statistics are known) ``qlora_kit.merge`` refuses by default, which is marked with an asterisk; here
``force`` is set.

Statistics for error feedback are those of 128 rows of the fine-tune's own training text, or of the built-in text where
the row says so; both are other files than those that are measured on. "--seeds" trains and merges as many adapters a
case, and adds a table of means and standard deviations over them with what the layers hold: of each layer the share of
its delta that arrives in its outputs (``LayerFidelity.kept``, on the statistics' text), the least of all layers, and
how many are below 0.95. peft's merge is measured in the same run on the NF4 base, loaded by peft from the same two
folders. It gets its best case: no forward pass before the merge (on a CPU with AVX512_BF16 one in evaluation mode makes
bitsandbytes rewrite the weights, and the merge then reads garbage: a row of its own), and the merged model is measured
protected from that. It can't merge into packed storage. For the encoder "cosine" is the mean one of the merged model's
embeddings with the adapted one's.

Run: python benchmarks/merge_quality.py --state FILE [--models DIR ... MiniLM] [--bits 4 3 2] [--rates 1e-4 ...]
    [--start zero] [--seeds 1] [--ways NAME ...]
A run that is cut off goes on from FILE; bases and adapters are kept beside it. "--table" only prints what it holds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from merge_adapters import Case, Encoder, Store, Task
from torch import Tensor, nn

from loftq.for_merging import text_moments
from qlora_kit import LoraModel, merge
from qlora_kit.codecs import codec_for, protect_storage_
from qlora_kit.demo.models import quiet, reference_model_path
from qlora_kit.layers import AdapterLayer
from qlora_kit.naming import Tree

LEAST_RETAINED = 0.5
PEFT, PEFT_LATE = "peft", "peft, a forward pass before"


@dataclass(frozen=True)
class Way:
    """A row: ``options`` of ``qlora_kit.merge``; statistics of the inputs on the "train" or the "builtin" text."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    statistics: str | None = None


def _all_ways() -> list[Way]:
    dense: dict[str, Any] = {"into": "bfloat16"}
    search, feedback = {"rounding": "scale-search"}, {"rounding": "error-feedback"}
    return [
        Way("bfloat16", dense),
        Way("bfloat16, onto the original weights", {**dense, "base": "original"}),
        Way("bfloat16, base='auto'", {**dense, "base": "auto"}),
        Way("nearest"),
        Way("scale search", search),
        Way("error feedback", feedback, "train"),
        Way("error feedback, built-in text", feedback, "builtin"),
        Way("nearest, onto the original weights", {"base": "original"}),
        Way("error feedback, onto the original weights", {**feedback, "base": "original"}, "train"),
        *(Way(f"nearest + r = {rank}", {"residual_rank": rank}) for rank in (4, 8, 16)),
        *(Way(f"error feedback + r = {rank}", {**feedback, "residual_rank": rank}, "train") for rank in (4, 8, 16)),
    ]


WAYS = _all_ways()


class State:
    """Results by case; kept in a file after each way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def at(self, case: Case) -> dict[str, Any]:
        return self.found.setdefault(case.key, {"ways": {}})

    def save(self) -> None:
        self.path.write_text(json.dumps(self.found, indent=1))


def run(case: Case, store: Store, state: State, wanted: list[str] | None) -> None:
    """Fill in one case."""
    row = state.at(case)
    task = store.task(case)
    if "adapted" not in row:
        lora = store.adapted(case)
        row["adapted"] = task.measure(lora)
        with lora.disable_adapter():
            row["base"] = task.measure(lora)
        row["bits"], row["adapter_bits"] = bits_of(lora)
        state.save()
        print(f"{case.key}: base {row['base']:.4f}, adapted {row['adapted']:.4f}", flush=True)
    moments: dict[str, Mapping[str, Tensor]] = {}
    expected = task.embeddings(store.adapted(case)) if isinstance(task, Encoder) else None
    for way in WAYS:
        skipped = way.options.get("base") == "auto" and isinstance(task, Encoder)
        if way.name in row["ways"] or skipped or (wanted and way.name not in wanted):
            continue
        lora = store.adapted(case)
        if way.statistics and way.statistics not in moments:
            text = task.train if way.statistics == "train" else task.builtin
            moments[way.statistics] = text_moments(text, lora.model, list(lora.adapter_layers()))
        options = case.storage | way.options
        if "base" in options:
            options["original"] = task.original
        began = time.monotonic()
        report = merge(
            lora,
            statistics=moments[way.statistics] if way.statistics else None,
            residual_dtype=torch.bfloat16 if options.get("residual_rank") else None,
            text=task.train if options.get("base") == "auto" else None,
            force=True,
            **options,
        )
        seconds = time.monotonic() - began
        found = measured(task, report.model, expected)
        found |= {"retained": report.retained, "arrived": report.kept, "seconds": seconds, "chosen": report.base}
        found["layers"] = [layer.kept for layer in report.layers if layer.delta_ratio]
        row["delta_ratio"] = report.mean("delta_ratio")
        _done(state, case, way.name, found)
    for name in (PEFT, PEFT_LATE):
        if case.bits == 4 and name not in row["ways"] and not (wanted and name not in wanted):
            _done(state, case, name, measured(task, merged_by_peft(case, store, late=name == PEFT_LATE), expected))


def merged_by_peft(case: Case, store: Store, *, late: bool) -> nn.Module:
    from peft import PeftModel

    base = store.base(case)
    adapted: Any = PeftModel.from_pretrained(base, str(store.adapter_folder(case)))
    if late:
        store.task(case).measure(adapted)
    merged = adapted.merge_and_unload()
    protect_storage_(merged)
    return merged


def measured(task: Task, model: nn.Module, expected: Tensor | None) -> dict[str, Any]:
    """The merged model's number and bits; with the adapted model's embeddings, how far its own are from those."""
    protect_storage_(model)
    found: dict[str, Any] = {"value": task.measure(model)}
    if isinstance(task, Encoder) and expected is not None:
        found["cosine"] = float((task.embeddings(model).float() * expected).sum(-1).mean())
    found["bits"], found["residual_bits"] = bits_of(model)
    return found


def bits_of(model: nn.Module) -> tuple[float, float]:
    """Bits a weight of the linears inside the blocks as they are stored, and of the branches beside them."""
    weights = stored = beside = 0
    for path, module in Tree(model.model if isinstance(model, LoraModel) else model).modules.items():
        base: Any = module.base_layer if isinstance(module, AdapterLayer) else module
        if isinstance(base, nn.Linear) and "head" not in path:
            codec = codec_for(base, path)
            size = codec.shape(base)
            weights += size[0] * size[1]
            stored += 8 * codec.nbytes(base)
            if isinstance(module, AdapterLayer):
                beside += 16 * sum(module.r.values()) * sum(size)
    return stored / weights, beside / weights


def print_tables(state: State) -> None:
    """Markdown, one table for each model, number of bits and start; sizes of the delta beside one another."""
    groups: dict[tuple[str, int, str], list[tuple[str, dict[str, Any]]]] = {}
    for key, row in state.found.items():
        model, bits, start, rate, seed = key.split(" | ")
        groups.setdefault((model, int(bits), start), []).append((f"{rate}, {seed}", row))
    for (model, bits, start), rows in sorted(groups.items(), key=lambda group: (group[0][0], -group[0][1])):
        rows.sort(key=lambda named: named[1].get("delta_ratio", 0))
        number, more = ("loss", ", cosine") if model == "MiniLM" else ("perplexity", "")
        print(f"\n{model}, {bits} bits, {start} start: {number}, kept, retained{more}\n")
        heads = [f"delta {row.get('delta_ratio', 0):.1%} (rate, seed {name})" for name, row in rows]
        print(f"| | bits | {' | '.join(heads)} |\n| --- | ---: |{' ---: |' * len(rows)}")
        print(f"| base | {rows[0][1]['bits']:.2f} | {' | '.join(_number(row['base']) for _, row in rows)} |")
        own = f"{rows[0][1]['bits']:.2f} + {rows[0][1]['adapter_bits']:.2f}"
        print(f"| adapter, not merged | {own} | {' | '.join(_number(row['adapted']) for _, row in rows)} |")
        for name in (*(way.name for way in WAYS), PEFT, PEFT_LATE):
            found = next((row["ways"][name] for _, row in rows if name in row["ways"]), None)
            if found:
                own = f"{found['bits']:.2f}" + (f" + {found['residual_bits']:.2f}" if found["residual_bits"] else "")
                print(f"| {name} | {own} | {' | '.join(_cell(row, name) for _, row in rows)} |")


def print_seeds(state: State) -> None:
    """Markdown, one table for each model, number of bits, start and rate with more than one seed."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, row in state.found.items():
        *case, _ = key.split(" | ")
        groups.setdefault(tuple(case), []).append(row)
    for (model, bits, start, rate), rows in groups.items():
        if len(rows) == 1:
            continue
        print(f"\n{model}, {bits} bits, {start} start, rate {rate}, {len(rows)} seeds: mean ± standard deviation\n")
        print("| | number | kept | least share of a layer | layers below 0.95 |\n| --- | ---: | ---: | ---: | ---: |")
        for name in ("base", "adapted"):
            print(f"| {name} | {_spread([row[name] for row in rows], '.3f')} | | | |")
        for name in (*(way.name for way in WAYS), PEFT):
            found = [(row, row["ways"][name]) for row in rows if name in row["ways"]]
            if found:
                kept = [(row["base"] - way["value"]) / (row["base"] - row["adapted"]) for row, way in found]
                shares = [way["layers"] for _, way in found if "layers" in way]
                least = _spread([min(own) for own in shares], ".2f") if shares else ""
                below = _spread([sum(share < 0.95 for share in own) for own in shares], ".1f") if shares else ""
                number = _spread([way["value"] for _, way in found], ".3f")
                print(f"| {name} | {number} | {_spread(kept, '.1%')} | {least} | {below} |")


def _spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def _cell(row: dict[str, Any], name: str) -> str:
    way = row["ways"].get(name)
    if way is None:
        return ""
    kept = (row["base"] - way["value"]) / (row["base"] - row["adapted"])
    cell = f"{_number(way['value'])}, " + (f"{kept:.0%}" if kept > -10 else "all lost")
    if "retained" in way:
        refused = way["bits"] < 16 and way["arrived"] < LEAST_RETAINED
        cell += f", {way['retained']:.0%}{'*' if refused else ''}"
    if "cosine" in way:
        cell += f", {way['cosine']:.4f}"
    if way.get("chosen") == "original" and "auto" in name:
        cell += " (original)"
    return cell


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def _done(state: State, case: Case, name: str, found: dict[str, Any]) -> None:
    row = state.at(case)
    row["ways"][name] = found
    state.save()
    print(f"{case.key}: {name} ({found['bits']:.2f} + {found['residual_bits']:.2f}): {_cell(row, name)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reference = reference_model_path()
    parser.add_argument(
        "--state", type=Path, required=True, help="where results are kept; bases and adapters beside it"
    )
    parser.add_argument("--models", nargs="*", default=[str(reference), str(reference.parent / "second_lm"), "MiniLM"])
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2], choices=(2, 3, 4))
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--start", default="zero", choices=("zero", "loftq"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of a language model; a state is of one number of steps")
    parser.add_argument("--encoder-steps", type=int, default=30, help="of MiniLM")
    parser.add_argument("--ways", nargs="*", help="rows to fill in; default: all")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    args = parser.parse_args()
    state = State(args.state)
    libraries = ("torch", "transformers", "bitsandbytes", "peft")
    print(f"python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in libraries)}")
    if not args.table:
        steps = {"language": args.steps, "encoder": args.encoder_steps}
        store = Store(args.state.with_name(args.state.stem + "_adapters"), steps)
        with quiet():
            for bits in args.bits:
                for model in args.models:
                    for rate in args.rates:
                        for seed in range(args.seeds):
                            run(Case(model, bits, rate, args.start, seed), store, state, args.ways)
    print_tables(state)
    print_seeds(state)


if __name__ == "__main__":
    main()
