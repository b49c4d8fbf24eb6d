"""How much sooner is ``loftq init`` done by two processes than by one?

The whole command, on a Llama that is made for it: reading, computing, writing, and what starting a process takes, which
both have to wait for. One thread a process. Wall time, in medians of repetitions in turn; where other work is on the
machine it says little, and beside it is the processor time of the busiest process, which is the least that the wall
time would be without that. The two outputs are compared byte by byte.

Run: python benchmarks/loftq_ranks.py [--repeats 5] [--processes 2] [--hidden 1024] [--layers 4]
The machine's load is printed before and after.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg"}
WORDS = 2000
AS_RANK = "--as-rank"


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """A Llama in bfloat16 and a tokenizer of the commonest words of the text that every Python brings along."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from loftq.inputs.text import builtin_text

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 11 * hidden // 4, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=WORDS, num_attention_heads=8, num_key_value_heads=4, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator(builtin_text(400_000), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def timed(processes: int, arguments: list[str], room: Path) -> tuple[float, float, float]:
    """Seconds of the wall that the command takes, of the busiest process's processor, and of all of theirs together."""
    for file in room.glob("*.seconds"):
        file.unlink()
    start = [__file__, AS_RANK, str(room)]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *start]
    began = time.perf_counter()
    run = subprocess.run([sys.executable, *start, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if run.returncode:
        raise SystemExit(run.stderr)
    spent = [float(file.read_text()) for file in room.glob("*.seconds")]
    return wall, max(spent), sum(spent)


def as_rank(room: str, *arguments: str) -> None:
    """One process of the command, which leaves its seconds in ``room``."""
    from loftq.cli import app

    try:
        app(list(arguments))
    finally:
        (Path(room) / f"{os.environ.get('RANK', 0)}.seconds").write_text(str(time.process_time()))


def tensors_of(folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--methods", default="loftq,aligned")
    options = parser.parse_args()
    counts = (1, options.processes)
    print(f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} CPUs, one thread a process")
    print(f"load before: {os.getloadavg()[0]:.1f}\n")
    print("| method | processes | wall s | sooner | processor s, busiest | less | of all | the same bytes |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "source"
        make_model(source, options.hidden, options.layers)
        for method in options.methods.split(","):
            found: dict[int, list[tuple[float, float, float]]] = {count: [] for count in counts}
            for repeat in range(options.repeats):
                for count in counts:
                    out = Path(room) / f"{method}-{repeat}-{count}"
                    text = [] if method == "loftq" else ["--calibration-rows", "16", "--calibration-tokens", "256"]
                    task = ["--model", str(source), "--out", str(out), "--bits", "2", "--method", method, *text]
                    task = ["init", *task, "--device", "cpu", "--rank", "16"]
                    found[count].append(timed(count, task, Path(room)))
            one, several = (Path(room) / f"{method}-0-{count}" for count in counts)
            same = "yes" if tensors_of(one) == tensors_of(several) else "NO"
            medians = {count: [statistics.median(part) for part in zip(*found[count], strict=True)] for count in counts}
            for count in counts:
                wall, busiest, together = medians[count]
                print(
                    f"| {method} | {count} | {wall:.1f} | {medians[1][0] / wall:.2f} | {busiest:.1f} | "
                    f"{medians[1][1] / busiest:.2f} | {together:.1f} | {same} |",
                    flush=True,
                )
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    as_rank(*sys.argv[2:]) if sys.argv[1:2] == [AS_RANK] else main()
