"""How long it takes to put adapters on the 224 linears of a 7B-shaped Llama, on the meta device.

Run: python benchmarks/injection_speed.py
peft's get_peft_model on the same model in the same run stands beside it.
"""

from __future__ import annotations

import platform
import time

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit

REPEATS = 3


def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def ours() -> int:
    config = qlora_kit.LoraConfig(r=16, target_modules="all-linear")
    return len(qlora_kit.apply_lora(model(), config).adapter_layers())


def theirs() -> int:
    config = peft.LoraConfig(r=16, target_modules="all-linear")
    adapted = peft.get_peft_model(model(), config, low_cpu_mem_usage=True)
    return sum(isinstance(module, peft.tuners.lora.LoraLayer) for module in adapted.modules())


def best_of(function, repeats: int = REPEATS) -> tuple[float, int]:
    """(fewest seconds, layers adapted); making the model costs the same for both and is timed apart."""
    times, count = [], 0
    for _ in range(repeats):
        began = time.perf_counter()
        count = function()
        times.append(time.perf_counter() - began)
    return min(times), count


def main() -> None:
    making, _ = best_of(lambda: len(list(model().modules())))
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, function in (("qlora_kit", ours), (f"peft {peft.__version__}", theirs)):
        seconds, count = best_of(function)
        print(f"{name:14} {count} linears adapted in {seconds - making:.2f} s (+ {making:.2f} s to make the model)")


if __name__ == "__main__":
    main()
