"""How long does a merge from disk to disk take, how much memory, and does it survive a kill? Beside peft's.

Makes Llama-shaped checkpoints of random bfloat16 weights (hidden size 4096, all the same but for the number of layers)
and an adapter of rank 16 on all linears of each. ``qlora-kit merge`` and peft (load, ``merge_and_unload``,
``save_pretrained``) merge it into bfloat16, each in a process of its own, of which the time and the peak of resident
memory are taken; and in float64, for some layers, how far what was written is from base + delta, in units of the delta.
The smallest is also merged with one kill (SIGKILL) halfway and resumed: its files must equal those of the run that was
let finish.

Run: python benchmarks/merge_disk.py --folder /big/disk [--sizes 2,8] [--into bfloat16,nf4]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from loftq_memory import HIDDEN, LARGEST, MLP, apart, digest, make_checkpoint, run
from safetensors import safe_open

from qlora_kit import LoraConfig
from qlora_kit.adapter_files.folder import PREFIX, write_adapter
from qlora_kit.checkpoints.shards import INDEX_SUFFIX, ShardReader
from qlora_kit.folders.merge.run import REPORT_NAME, WORK_FOLDER

RANK = 16
SAMPLES = 3
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (MLP, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, MLP),
}


def make_base(folder: Path, gigabytes: float) -> None:
    """A checkpoint with the index that transformers asks for."""
    make_checkpoint(folder, gigabytes)
    weight_map = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            weight_map.update(dict.fromkeys(shard.keys(), file.name))
    (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def make_adapter(base: Path, folder: Path) -> None:
    """On every linear of ``base``; deltas of about a hundredth of the weights."""
    layers = sum(name.endswith("q_proj.weight") for name in ShardReader(base))
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in range(layers):
        for name, (out, width) in LINEARS.items():
            stem = f"{PREFIX}model.layers.{layer}.{name}"
            state[f"{stem}.lora_A.weight"] = torch.randn(RANK, width, generator=generator) * width**-0.5
            state[f"{stem}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.003
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    write_adapter(folder, config.as_stored(), state)


def command(base: Path, adapter: Path, out: Path, into: str = "bfloat16") -> list[str]:
    program = str(Path(sys.executable).with_name("qlora-kit"))
    options = {"--base": base, "--adapter": adapter, "--out": out, "--into": into}
    return [program, "merge", *(str(x) for pair in options.items() for x in pair)]


def peft_merge(base: str, adapter: str, out: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


def worst_error(base: Path, adapter: Path, out: Path) -> float:
    """The largest ||stored - (base + delta)|| / ||delta|| of some layers, in float64."""
    before, factors, after = ShardReader(base), ShardReader(adapter), ShardReader(out)
    paths = [name.removesuffix(".weight") for name in before if "_proj" in name]
    worst = 0.0
    for path in paths[:: len(paths) // SAMPLES][:SAMPLES]:
        A, B = (factors.tensor(f"{PREFIX}{path}.lora_{side}.weight").double() for side in "AB")
        delta = B @ A
        lost = after.tensor(f"{path}.weight").double() - before.tensor(f"{path}.weight").double() - delta
        worst = max(worst, float(lost.norm() / delta.norm()))
    return worst


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the report, which names the folder."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and WORK_FOLDER not in f.parts)
    return {str(file.relative_to(folder)): digest(file) for file in files if file.name != REPORT_NAME}


def kill_and_resume(base: Path, adapter: Path, whole: Path, again: Path) -> None:
    units = len((whole / WORK_FOLDER / "journal.jsonl").read_bytes().splitlines()) - 1
    journal = again / WORK_FOLDER / "journal.jsonl"
    process = subprocess.Popen(command(base, adapter, again), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < units // 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = journal.read_bytes().count(b"\n") - 1
    seconds, _ = run(command(base, adapter, again))
    print(
        f"\nkilled after {done} of {units} tensors and resumed in {seconds:.0f} s: the same files as uninterrupted: "
        f"{hashes(whole) == hashes(again)}\n",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes", default="2,8.2")
    parser.add_argument("--into", default="bfloat16")
    options = parser.parse_args()
    versions = f"python {platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores"
    print(f"{versions}; largest tensor {LARGEST / 1e6:.0f} MB in bfloat16; rank {RANK}\n")
    print("| checkpoint GB | by | into | seconds | peak memory GB | written GB | worst error / delta |")
    print("| ---: | --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    sizes = [float(size) for size in options.sizes.split(",")]
    for number, size in enumerate(sizes):
        base, adapter, out = (options.folder / f"{name}-{size:g}" for name in ("base", "adapter", "out"))
        shutil.rmtree(out, ignore_errors=True)
        if not (adapter / "adapter_config.json").exists():  # else they are whole, from an earlier run
            for folder in (base, adapter):
                shutil.rmtree(folder, ignore_errors=True)
            apart(make_base, base, size)
            apart(make_adapter, base, adapter)
        stored = sum(file.stat().st_size for file in base.glob("*.safetensors"))

        def row(by: str, into: str, arguments: list[str]) -> None:
            seconds, peak = run(arguments)
            written = sum(file.stat().st_size for file in out.glob("*.safetensors"))  # noqa: B023
            # In a process of its own: a child's peak of memory begins with that of who starts it.
            asked = [sys.executable, __file__, "--error", str(base), str(adapter), str(out)]  # noqa: B023
            error = subprocess.check_output(asked, text=True).strip() if into == "bfloat16" else ""
            cells = [f"{stored / 1e9:.2f}", by, into, f"{seconds:.0f}", f"{peak / 1e9:.2f}", f"{written / 1e9:.2f}"]  # noqa: B023
            print("| " + " | ".join([*cells, error]) + " |", flush=True)

        for into in options.into.split(","):
            row("qlora-kit", into, command(base, adapter, out, into))
            if number == 0 and into == "bfloat16":
                kept = options.folder / "whole"
                shutil.rmtree(kept, ignore_errors=True)
                out.rename(kept)
            else:
                shutil.rmtree(out)
        peft = [sys.executable, __file__, "--peft", str(base), str(adapter), str(out)]
        row("peft", "bfloat16", peft)
        shutil.rmtree(out)
        if number == 0:
            again = options.folder / "again"
            shutil.rmtree(again, ignore_errors=True)
            kill_and_resume(base, adapter, options.folder / "whole", again)
            shutil.rmtree(again)
            shutil.rmtree(options.folder / "whole")
        shutil.rmtree(base)
        shutil.rmtree(adapter)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peft"]:
        peft_merge(*sys.argv[2:])
    elif sys.argv[1:2] == ["--error"]:
        print(f"{worst_error(*map(Path, sys.argv[2:])):.4f}")
    else:
        main()
