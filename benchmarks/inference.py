"""What adapters cost in inference while they aren't merged: against merged, against the base alone, against peft.

Run: python benchmarks/inference.py [float32 bfloat16 nf4 int8 packed2] [--hidden 512] [--repeats 15]

A Llama of 4 layers, rank 16 on its 28 linears; a decoding step of one token behind 64 in the cache, in batches of 1 and
of 8, and 256 tokens at once. One thread; processor time; the variants take turns in each repetition; medians. The last
column is what one adapter layer adds to a forward.
"""

from __future__ import annotations

import argparse
import copy
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import qlora_kit

LAYERS, BEFORE, STEPS = 4, 64, 8
#: By storage: the dtype of all else, the bits of ``quantize_``, and the flag by which peft tells quantized models.
STORAGES: dict[str, tuple[torch.dtype, int | None, str | None]] = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "nf4": (torch.bfloat16, 4, "is_loaded_in_4bit"),
    "int8": (torch.bfloat16, 8, "is_loaded_in_8bit"),
    "packed2": (torch.bfloat16, 2, None),
}


def llama(hidden: int, storage: str) -> LlamaForCausalLM:
    dtype, bits, flag = STORAGES[storage]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    if bits is not None:
        qlora_kit.quantize_(model, bits)
    if flag is not None:
        setattr(model, flag, True)
    return model.requires_grad_(False)


def ours(model: nn.Module) -> Any:
    config = qlora_kit.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    return qlora_kit.apply_lora(model, config).eval()


def theirs(model: nn.Module) -> Any:
    config = peft.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, inference_mode=True)
    return peft.get_peft_model(model, config).eval()


def variants(hidden: int, storage: str) -> dict[str, Any]:
    """The model alone, with our adapters, with these merged into its storage, with peft's."""
    model = llama(hidden, storage)
    return {
        "base": model,
        "ours": ours(copy.deepcopy(model)),
        "merged": ours(copy.deepcopy(model)).merge_and_unload(),
        "peft": theirs(copy.deepcopy(model)),
    }


def decoding(model: Any, batch: int) -> Callable[[], None]:
    """``STEPS`` steps of one token each, from the same cache every time."""
    tokens, cache = torch.ones(batch, BEFORE, dtype=torch.long), DynamicCache()
    model(input_ids=tokens, past_key_values=cache, use_cache=True)

    def steps() -> None:
        for _ in range(STEPS):
            model(input_ids=tokens[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-STEPS)

    return steps


def prefill(model: Any, count: int = 256) -> Callable[[], None]:
    tokens = torch.ones(1, count, dtype=torch.long)
    return lambda: model(input_ids=tokens, use_cache=False)


def medians(functions: dict[str, Callable[[], None]], repeats: int, each: int) -> dict[str, float]:
    """Milliseconds of one forward; ``each`` are in a call."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = time.process_time()
            function()
            times[name].append((time.process_time() - began) / each * 1e3)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("storages", nargs="*", default=list(STORAGES))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}; hidden size {arguments.hidden}, {arguments.repeats} repetitions"
    )
    print("| weights | forward | base, ms | merged | ours | peft | ours / peft | us an adapter layer: ours, peft |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for storage in arguments.storages:
        models = variants(arguments.hidden, storage)
        layers = len(models["ours"].adapter_layers())
        for title, each, make in (
            ("1 token", STEPS, lambda model: decoding(model, 1)),
            ("8 x 1 token", STEPS, lambda model: decoding(model, 8)),
            ("256 tokens", 1, prefill),
        ):
            with torch.inference_mode():
                found = medians({name: make(model) for name, model in models.items()}, arguments.repeats, each)
            added = [f"{(found[name] - found['base']) / layers * 1e3:.0f}" for name in ("ours", "peft")]
            print(
                f"| {storage} | {title} | {found['base']:.2f} | {found['merged']:.2f} | {found['ours']:.2f} | "
                f"{found['peft']:.2f} | {found['ours'] / found['peft']:.2f} | {', '.join(added)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
