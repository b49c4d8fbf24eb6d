"""How much sooner is ``loftq init`` done by two processes than by one?

The whole command, on a Llama that is made for it: reading, computing, writing, and what starting a process takes, which
both have to wait for. One thread a process. Wall time, in medians of repetitions in turn, since processes wait for each
other; beside it the processor time of all processes together, which other work on the machine doesn't change much. The
two outputs are compared byte by byte.

Run: python benchmarks/loftq_ranks.py [--repeats 5] [--processes 2] [--hidden 1024] [--layers 4]
On 2 cores; other work on the machine falsifies the wall time, and its load is printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
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


def timed(processes: int, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the wall and of the processors that the command takes."""
    start = ["-m", "loftq"]
    if processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *start]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    run = subprocess.run([sys.executable, *start, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(run.stderr)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


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
    print("| method | processes | wall s, median (all) | sooner | processor s | the same bytes |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    with tempfile.TemporaryDirectory() as room:
        source = Path(room) / "source"
        make_model(source, options.hidden, options.layers)
        for method in options.methods.split(","):
            found: dict[int, list[tuple[float, float]]] = {count: [] for count in counts}
            for repeat in range(options.repeats):
                for count in counts:
                    out = Path(room) / f"{method}-{repeat}-{count}"
                    text = [] if method == "loftq" else ["--calibration-rows", "16", "--calibration-tokens", "256"]
                    task = ["--model", str(source), "--out", str(out), "--bits", "2", "--method", method, *text]
                    found[count].append(timed(count, ["init", *task, "--device", "cpu", "--rank", "16"]))
            one, several = (Path(room) / f"{method}-0-{count}" for count in counts)
            same = tensors_of(one) == tensors_of(several)
            alone = statistics.median(wall for wall, _ in found[1])
            for count in counts:
                wall = statistics.median(wall for wall, _ in found[count])
                spent = statistics.median(spent for _, spent in found[count])
                each = ", ".join(f"{wall:.1f}" for wall, _ in found[count])
                print(
                    f"| {method} | {count} | {wall:.1f} ({each}) | {alone / wall:.2f} | {spent:.1f} | "
                    f"{'yes' if same else 'NO'} |",
                    flush=True,
                )
    print(f"\nload after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
