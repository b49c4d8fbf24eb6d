"""Training what will be merged, beside merging what was trained: how good is the model that is left?

Adapters of rank 16 on all linear layers (``merge_adapters``) learn torch's sources from the same batches by the same
optimizer, once as usual and once merge-aware (``LoraConfig.merge_aware``), on three bases:

- "as stored": NF4, or the default types of 3 and 2 bits, double quantization; what is merged is that base plus the
  delta, rounded anew. Its weights lie on the codes, so that a delta changes a code where it is larger than half a step;
- "of more bits": NF4 for what is merged into 3 and 2 bits, int8 for 4. Most weights lie between the codes of the merge,
  and a small delta changes those that are near a midpoint;
- "16 bits": all of them do, for the memory of 16-bit training.

What was trained as usual is merged to the nearest codes, with error feedback (on the training text's inputs), and with
a residual branch of rank 8 beside the nearest codes; what was trained merge-aware is merged as it was trained for, and
is measured unmerged as well (``set_merge_aware(False)``). The number is perplexity on held-out files, mean and standard
deviation over seeds. What all of it is for heads each table: an adapter trained on the 16-bit weights, not merged.
Every adapter is trained with each of the rates; a row shows the one that is best for it by the mean of the seeds.

"step" is the processor time of a training step (forward, backward, optimizer) in units of the plain one's, medians of
steps that take turns in one process.

Run: python benchmarks/merge_aware.py --state FILE [--models DIR ...] [--bits 4 3 2] [--rates 1e-3 ...] [--seeds 3]
A run that is cut off goes on from FILE; bases and adapters are kept beside it. "--table" only prints what it holds.
"""

from __future__ import annotations

import argparse
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from merge_adapters import Case, Store, Task
from merge_quality import State, Way, bits_of, measured

from loftq.for_merging import text_moments
from qlora_kit import LoraModel, merge
from qlora_kit.demo.models import quiet, reference_model_path

_FEEDBACK = {"rounding": "error-feedback"}
WAYS = [
    Way("nearest"),
    Way("error feedback", _FEEDBACK, "train"),
    Way("nearest + r = 8", {"residual_rank": 8}),
]
UNMERGED, MERGED = "not merged", "merged"
TITLES = {"zero": "as stored", "loftq": "as stored, LoftQ start", "wide": "of more bits", "dense": "16 bits"}
_TIMED = 7


def run(case: Case, store: Store, state: State) -> None:
    """Train one adapter where it isn't trained yet, merge and measure it."""
    found, task = state.at(case)["ways"], store.task(case)
    if UNMERGED not in found:
        lora = store.adapted(case)
        with lora.set_merge_aware(False):
            _note(state, case, UNMERGED, {"value": task.measure(lora), "bits": list(bits_of(lora))})
        with lora.disable_adapter():
            state.at(case)["base"] = task.measure(lora)
    if case.aware and "before merging" not in found:
        _note(state, case, "before merging", {"value": task.measure(store.adapted(case))})
    for way in [Way(MERGED)] if case.aware else WAYS:
        if way.name not in found:
            lora = store.adapted(case)
            moments = text_moments(task.train, lora.model, list(lora.adapter_layers())) if way.statistics else None
            beside = torch.bfloat16 if way.options.get("residual_rank") else None
            options = {} if case.aware else case.storage | way.options
            report = merge(lora, statistics=moments, residual_dtype=beside, force=not case.aware, **options)
            row = {**measured(task, report.model, None), "retained": report.retained, "trained": report.trained}
            _note(state, case, way.name, row)


def time_steps(case: Case, store: Store, state: State) -> None:
    """Processor seconds of a plain step and of a merge-aware one, which take turns."""
    row = state.at(case)
    if "step" in row:
        return
    task: Any = store.task(case)
    entrants = {
        aware: _trainer(Case(case.model, case.bits, case.rate, case.start, 0, aware), store, task)
        for aware in (False, True)
    }
    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(_TIMED + 1):
        for aware, step in entrants.items():
            began = time.process_time()
            step(task.windows.train[4 * number : 4 * number + 4])
            times[aware].append(time.process_time() - began)
    row["step"] = median(times[True][1:]) / median(times[False][1:])
    state.save()


def _trainer(case: Case, store: Store, task: Task) -> Any:
    lora = LoraModel.from_pretrained(store.base(case), store.adapter_folder(case), is_trainable=True).train()
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=case.rate)

    def step(rows: torch.Tensor) -> None:
        lora(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _note(state: State, case: Case, name: str, row: dict[str, Any]) -> None:
    state.at(case)["ways"][name] = row
    state.save()
    print(f"{case.key}: {name}: {row['value']:.3f}", flush=True)


def print_tables(state: State) -> None:
    """Markdown: a table for each model and number of bits."""
    groups: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for key, row in state.found.items():
        model, bits, start, rate, _, *aware = key.split(" | ")
        groups.setdefault((model, bits, start, "aware" if aware else "plain"), {}).setdefault(rate, []).append(row)
    models = dict.fromkeys((model, bits) for model, bits, *_ in groups)
    for model, bits in sorted(models, key=lambda pair: (pair[0], -int(pair[1]))):
        target = groups.get((model, bits, "dense", "plain"), {})
        best = _best(target, UNMERGED)
        print(f"\n{model}, {bits} bits; 16-bit LoRA, not merged: {best[1]}\n")
        print("| base | trained | merged | perplexity | bits | rate | step |")
        print("| --- | --- | --- | ---: | ---: | ---: | ---: |")
        for start, title in TITLES.items():
            for kind in ("plain", "aware"):
                rates = groups.get((model, bits, start, kind), {})
                for name in _names(rates):
                    rate, number, row = _best(rates, name)
                    stored = row["ways"][name].get("bits")
                    size = f"{stored:.2f}" if isinstance(stored, float) else ""
                    beside = row["ways"][name].get("residual_bits")
                    size += f" + {beside:.2f}" if beside else ""
                    step = f"{row['step']:.2f}" if kind == "aware" and name == MERGED and "step" in row else ""
                    print(f"| {title} | {kind} | {name} | {number} | {size} | {rate} | {step} |")


def _names(rates: dict[str, list[dict[str, Any]]]) -> list[str]:
    return list(dict.fromkeys(name for rows in rates.values() for row in rows for name in row["ways"]))


def _best(rates: dict[str, list[dict[str, Any]]], name: str) -> tuple[str, str, dict[str, Any]]:
    """The rate with the least mean of ``name``, that with its spread, and one of its rows."""
    values = {rate: [row["ways"][name]["value"] for row in rows if name in row["ways"]] for rate, rows in rates.items()}
    values = {rate: found for rate, found in values.items() if found}
    if not values:
        return "", "not measured", {}
    rate = min(values, key=lambda each: mean(values[each]))
    found = values[rate]
    spread = f" ± {stdev(found):.2f}" if len(found) > 1 else ""
    row = next((row for row in rates[rate] if "step" in row), rates[rate][0])
    return rate, f"{mean(found):.2f}{spread}", row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--state", type=Path, required=True, help="where results are kept; adapters beside it")
    parser.add_argument("--models", nargs="*", default=[str(reference_model_path())], help="folders with a tokenizer")
    parser.add_argument("--bits", nargs="*", type=int, default=[4, 3, 2], choices=(2, 3, 4))
    parser.add_argument("--rates", nargs="*", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--starts", nargs="*", default=["zero", "wide", "dense"], choices=tuple(TITLES))
    parser.add_argument("--kinds", nargs="*", default=["aware", "plain"], choices=("aware", "plain"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="a state is of one number of steps")
    parser.add_argument("--table", action="store_true", help="print the tables and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = State(args.state)
    libraries = ("torch", "transformers", "bitsandbytes")
    print(f"python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in libraries)}")
    if not args.table:
        store = Store(args.state.with_name(args.state.stem + "_adapters"), {"language": args.steps, "encoder": 0})
        with quiet():
            for seed in range(args.seeds):
                for model in args.models:
                    for bits in args.bits:
                        for start in args.starts:
                            for rate in args.rates:
                                for kind in args.kinds:
                                    run(Case(model, bits, rate, start, seed, kind == "aware"), store, state)
                                if seed == 0 and len(args.kinds) > 1:
                                    time_steps(Case(model, bits, rate, start, seed, True), store, state)
    print_tables(state)


if __name__ == "__main__":
    main()
