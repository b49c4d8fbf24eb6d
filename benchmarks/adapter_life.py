"""What becomes of adapters on a model's 224 linears, against peft: merged, merged in place, deleted.

Run: python benchmarks/adapter_life.py [--hidden 256] [--repeats 7] [--dtype float32]
One thread; each repetition makes both models anew and times ours and peft's one after the other; medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit

ACTIONS: dict[str, Callable[[Any], object]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_adapter": lambda model: model.merge_adapter(),
    "unmerge_adapter": lambda model: model.unmerge_adapter(),
    "delete_adapter": lambda model: model.delete_adapter("other"),
    "unload": lambda model: model.unload(),
}
#: What has to have happened before the clock starts.
BEFORE: dict[str, Callable[[Any], object]] = {"unmerge_adapter": lambda model: model.merge_adapter()}


def ours(model: LlamaForCausalLM) -> Any:
    config = qlora_kit.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = qlora_kit.apply_lora(model, config)
    adapted.add_adapter("other", config)
    return adapted


def theirs(model: LlamaForCausalLM) -> Any:
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted.add_adapter("other", config)
    return adapted


def seconds(action: str, adapted: Any) -> float:
    BEFORE.get(action, lambda _: None)(adapted)
    began = time.perf_counter()
    ACTIONS[action](adapted)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("actions", nargs="*", default=list(ACTIONS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 2,
        num_hidden_layers=32,
        num_attention_heads=4,
    )
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}; hidden size {arguments.hidden}, {arguments.dtype}, {arguments.repeats} repetitions"
    )
    for action in arguments.actions:
        times: dict[str, list[float]] = {"ours": [], "peft": []}
        for _ in range(arguments.repeats):
            for name, make in (("ours", ours), ("peft", theirs)):
                times[name].append(seconds(action, make(LlamaForCausalLM(config).to(dtype))))
        own, other = (statistics.median(times[name]) for name in ("ours", "peft"))
        print(f"{action:18} {own * 1e3:8.1f} ms, peft {other * 1e3:8.1f} ms, ratio {own / other:.2f}")


if __name__ == "__main__":
    main()
