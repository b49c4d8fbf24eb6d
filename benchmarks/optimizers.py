"""What do optimizers of adapters hold and cost?

A Llama with adapters on all its linears; gradients are random, so that only the optimizers run: bytes of their states,
and the processor time of a step, one thread, the median of --repeats interleaved ones.

Run: python benchmarks/optimizers.py [--hidden 1024] [--layers 8] [--rank 16] [--repeats 9]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import torch
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit
from qlora_kit.training.optimizers import lora_fa_, lora_plus, optimizer

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda model: optimizer("adamw", model, lr=1e-4),
    "AdamW, 8 bits": lambda model: optimizer("adamw_8bit", model, lr=1e-4),
    "AdamW, paged, 8 bits": lambda model: optimizer("paged_adamw_8bit", model, lr=1e-4),
    "AdamW, paged, 32 bits": lambda model: optimizer("paged_adamw_32bit", model, lr=1e-4),
    "Lion, 8 bits": lambda model: optimizer("lion_8bit", model, lr=1e-4),
    "LoRA+, AdamW": lambda model: lora_plus(model, lr=1e-4),
    "LoRA+, AdamW, 8 bits": lambda model: lora_plus(model, "adamw_8bit", lr=1e-4),
    "LoRA-FA, AdamW": lambda model: lora_fa_(model, lr=1e-4),
    "LoRA-FA, AdamW, 8 bits": lambda model: lora_fa_(model, "adamw_8bit", lr=1e-4),
}


def model_of(args: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=8, num_key_value_heads=8, **sizes))
    start = qlora_kit.LoraConfig(r=args.rank, target_modules="all-linear", init_lora_weights=False)
    return qlora_kit.apply_lora(model, start)


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def state_bytes(made: Optimizer) -> int:
    """Each storage once: bitsandbytes' tables of levels are shared."""
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(dict(made.state))}
    return sum(held.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")
    print(f"{platform.platform()}, Python {platform.python_version()}, torch {torch.__version__}, one thread,")
    print(f"bitsandbytes {bitsandbytes.__version__}; {vars(args)}")
    models = {name: model_of(args) for name in MAKERS}
    made = {name: make(models[name]) for name, make in MAKERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in MAKERS}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            for parameter in trained(model):
                parameter.grad = torch.randn_like(parameter)
            began = time.process_time()
            made[name].step()
            if repeat:  # the first makes the states
                seconds[name].append(time.process_time() - began)
    print(f"{sum(p.numel() for p in trained(models['AdamW'])):,} numbers in the adapters\n")
    print("| optimizer | trained | bytes of state | a number trained | step, CPU ms | of AdamW's |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    base = statistics.median(seconds["AdamW"])
    for name, times in seconds.items():
        count, held = sum(p.numel() for p in trained(models[name])), state_bytes(made[name])
        median = statistics.median(times)
        sizes = f"{count:,} | {held:,} | {held / count:.2f}"
        print(f"| {name} | {sizes} | {1000 * median:.1f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
