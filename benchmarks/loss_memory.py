"""What does a training step hold for its loss, plain and in chunks?

A Llama of one layer with adapters on all its linears, a vocabulary of 131,072 and 2,048 tokens: forward, backward, a
step of AdamW. Each measurement is a process of its own: its peak of resident memory above that before the step, the
peak of tensors' bytes that operations make (counted below autograd), the bytes saved for the backward, and the
processor time of a step, one thread, the median of --repeats. Losses and gradients are compared with the plain one's.

Run: python benchmarks/loss_memory.py [--hidden 128] [--dtype float32] [--chunks 64 128 256 512] [--head frozen]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit
from qlora_kit.training import use_chunked_loss

HEADS = ("frozen", "4-bit", "adapter", "trained")


def model_of(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 2 * args.hidden, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=args.vocabulary, num_attention_heads=4, num_key_value_heads=4, **sizes)
    model = LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    if args.head == "4-bit":
        qlora_kit.quantize_(model, 4, target_modules=["lm_head"])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole = ["lm_head"] if args.head == "trained" else None
    targets += ["lm_head"] if args.head == "adapter" else []
    start = qlora_kit.LoraConfig(r=16, target_modules=targets, modules_to_save=whole, init_lora_weights=False)
    return qlora_kit.apply_lora(model, start).train()


class Step:
    """A training step that can be repeated, and what it holds."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model = model_of(args)
        if args.one:
            use_chunked_loss(self.model, chunk=args.one)
        ids = torch.randint(0, args.vocabulary, (1, args.tokens), generator=torch.Generator().manual_seed(1))
        self.batch = {"input_ids": ids, "labels": ids}
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> float:
        loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        del loss
        return value

    def gradient(self) -> float:
        found = sum(p.grad.double().square().sum().item() for p in self.model.parameters() if p.grad is not None)
        self.optimizer.zero_grad()
        return found**0.5


def measure(args: argparse.Namespace) -> dict[str, float]:
    """All numbers of one way, in this process."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from live_bytes import LiveBytes

    step = Step(args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found: dict[str, float] = {"loss": step()}
    unit = 1 if platform.system() == "Darwin" else 1024
    found["resident"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    found["gradient"] = step.gradient()
    seconds = []
    for _ in range(args.repeats):
        began = time.process_time()
        step()
        seconds.append(time.process_time() - began)
        step.optimizer.zero_grad()
    with LiveBytes(step.model) as counted:
        step()
    step.optimizer.zero_grad()
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage()._cdata for p in step.model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step.model(**step.batch).loss
    found["saved"] = sum(size for key, size in saved.items() if key not in own)
    del loss
    return {**found, "tensors": counted.peak - counted.before, "seconds": statistics.median(seconds)}


def in_a_process(chunk: int, arguments: list[str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, *arguments, "--one", str(chunk)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131_072)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--head", choices=HEADS, default="frozen")
    parser.add_argument("--chunks", type=int, nargs="*", default=[64, 128, 256, 512])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, help="the chunk of a single measurement, 0 for the plain loss")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one is not None:
        print(json.dumps(measure(args)))
        return
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, one thread,")
    print(f"transformers {transformers.__version__}; {vars(args)}\n")
    print("| rows at a time | resident peak | tensors' peak | saved | step, CPU s | loss apart | gradient apart |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    plain = None
    for chunk in (0, *args.chunks):
        found = in_a_process(chunk, sys.argv[1:])
        plain = plain or found
        sizes = " | ".join(f"{found[key] / 2**20:,.0f} MiB" for key in ("resident", "tensors", "saved"))
        apart = " | ".join(f"{abs(found[key] / plain[key] - 1):.1e}" for key in ("loss", "gradient"))
        print(f"| {chunk or 'all (plain)'} | {sizes} | {found['seconds']:.2f} | {apart} |", flush=True)


if __name__ == "__main__":
    main()
