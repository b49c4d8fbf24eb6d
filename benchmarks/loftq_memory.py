"""How much memory does ``loftq init`` take on checkpoints of several sizes, and does it survive a kill?

Makes Llama-shaped checkpoints of random bfloat16 weights (hidden size 4096, all the same but for the number of
layers), runs ``loftq init`` on each in a process of its own, and reads that process's peak of resident memory.
With --kill the middle one is run again, killed (SIGKILL) several times and resumed: its files must equal those of
the run that was let finish, transformers must load the base, and peft the adapter.

Run: python benchmarks/loftq_memory.py --folder /big/disk [--sizes 1,4,16] [--kill]
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig

from qlora_kit.checkpoints.growing_file import GrowingFile, header_room

HIDDEN, MLP, VOCABULARY = 4096, 11008, 8000
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * MLP)
LARGEST = 2 * HIDDEN * MLP


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """A folder with about that much of a Llama. Each layer is a shard."""
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / LAYER_BYTES))
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul_(0.02).bfloat16()

    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shards: list[dict[str, tuple[int, ...]]] = [{**ends, "model.norm.weight": (HIDDEN,)}]
    for index in range(layers):
        prefix = f"model.layers.{index}."
        square = {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        wide = {f"{prefix}mlp.{name}_proj.weight": (MLP, HIDDEN) for name in ("gate", "up")}
        norms = {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shards.append({**square, **wide, f"{prefix}mlp.down_proj.weight": (HIDDEN, MLP), **norms})
    for number, names in enumerate(shards):
        writer = GrowingFile(folder / f"part-{number}.safetensors", header_room(names))
        for name, shape in names.items():
            writer.append(name, torch.ones(shape).bfloat16() if len(shape) == 1 else random(*shape))
        writer.finish()


def apart(function: Callable[..., None], *arguments: object) -> None:
    """Run ``function`` in a process of its own: a child's peak of memory begins with that of who starts it."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__}{arguments} ended with {process.exitcode}")


def command(source: Path, out: Path, bits: int, steps: int) -> list[str]:
    loftq = str(Path(sys.executable).with_name("loftq"))
    options = {"--bits": bits, "--rank": 16, "--steps": steps, "--device": "cpu"}
    return [
        loftq,
        "init",
        "--model",
        str(source),
        "--out",
        str(out),
        *(str(x) for pair in options.items() for x in pair),
    ]


def run(arguments: list[str]) -> tuple[float, float]:
    """(seconds, peak resident bytes of that process)."""
    began = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{arguments} ended with {process.returncode}")
    return time.monotonic() - began, usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def hashes(folder: Path) -> dict[str, str]:
    """Of every file that a reader of the model or adapter looks at."""
    files = sorted(f for f in folder.rglob("*") if f.suffix in (".safetensors", ".json") and ".loftq" not in f.parts)
    kept = [file for file in files if file.name not in ("loftq_report.json", "adapter_config.json")]  # seconds, paths
    return {str(file.relative_to(folder)): digest(file) for file in kept}


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            found.update(chunk)
    return found.hexdigest()


def kill_and_resume(source: Path, whole: Path, again: Path, bits: int, steps: int, kills: int = 4) -> None:
    journal = again / ".loftq" / "journal.jsonl"
    done = len((whole / ".loftq" / "journal.jsonl").read_bytes().splitlines())
    for number in range(kills):
        process = subprocess.Popen(command(source, again, bits, steps), stdout=subprocess.DEVNULL)
        until = done * (number + 1) // (kills + 1)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < until):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(command(source, again, bits, steps))
    print(f"\nkilled {kills} times and resumed: the same files as uninterrupted: {hashes(whole) == hashes(again)}")


def load(out: Path) -> None:
    """The base by transformers, the adapter by peft and by us; the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from qlora_kit import LoraModel

    ids = torch.arange(8)[None]
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "loftq_init")(input_ids=ids)
        ours = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out), out / "loftq_init")(input_ids=ids)
    difference = (theirs.logits.float() - ours.logits.float()).abs().max() / ours.logits.float().abs().max()
    print(f"loaded by transformers and peft; logits against ours: {float(difference):.1e} relative")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", default="1,4,16")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--kill", action="store_true")
    options = parser.parse_args()
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    print(f"\nlargest tensor {LARGEST / 1e6:.0f} MB in bfloat16; {options.bits} bits, rank 16, T = {options.steps}\n")
    print("| checkpoint GB | output GB | peak memory GB | seconds |\n| ---: | ---: | ---: | ---: |", flush=True)
    sizes = [float(size) for size in options.sizes.split(",")]
    for number, size in enumerate(sizes):
        source, out = options.folder / f"source-{size:g}", options.folder / f"out-{size:g}"
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)
        apart(make_checkpoint, source, size)
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        seconds, peak = run(command(source, out, options.bits, options.steps))
        written = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        print(f"| {stored / 1e9:.2f} | {written / 1e9:.2f} | {peak / 1e9:.2f} | {seconds:.0f} |", flush=True)
        if options.kill and number == len(sizes) // 2:
            again = options.folder / "again"
            shutil.rmtree(again, ignore_errors=True)
            kill_and_resume(source, out, again, options.bits, options.steps)
            apart(load, again)
            shutil.rmtree(again)
        shutil.rmtree(source)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
