"""One batch whose rows go through four adapters, against the same batch through one of them, ours and peft's.

Run: python benchmarks/mixed_batch.py [--rows 32] [--words 64] [--hidden 512] [--layers 2] [--repeats 9]
Llama-shaped models of random weights, rank-16 adapters on all linears, one thread. Prefill is one forward of all words,
decode one more word on top of their cache. Medians of the process's CPU time; in each repetition all ways run one after
the other. "block": rows of an adapter stand next to each other; "mixed": each has another than the row before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit

ADAPTERS = ("a", "b", "c", "d")
STORAGES: dict[str, tuple[torch.dtype, bool]] = {
    "nf4": (torch.bfloat16, True),
    "bfloat16": (torch.bfloat16, False),
    "float32": (torch.float32, False),
}


def base(arguments: argparse.Namespace, storage: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden,
        intermediate_size=2 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
    )
    dtype, few_bits = STORAGES[storage]
    model = LlamaForCausalLM(config).to(dtype).eval()
    if few_bits:
        qlora_kit.quantize_(model, 4, quant_type="nf4")
        model.is_loaded_in_4bit = True  # by which peft chooses its layers
    return model


def adapted(arguments: argparse.Namespace, storage: str, kit: Any, wrap: Callable[..., Any]) -> Any:
    config = kit.LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    model = wrap(base(arguments, storage), config, ADAPTERS[0])
    for name in ADAPTERS[1:]:
        model.add_adapter(name, config)
    return model.eval()


@torch.no_grad()
def step(model: Any, ids: Tensor, before: Any = None, **names: Any) -> float:
    """CPU seconds of one forward; a cache is brought back to the length it had."""
    length = 0 if before is None else before.get_seq_length()
    began = time.process_time()
    model(input_ids=ids, past_key_values=before, use_cache=True, **names)
    seconds = time.process_time() - began
    if before is not None:
        before.crop(length - before.get_seq_length())
    return seconds


def measure(arguments: argparse.Namespace, storage: str) -> dict[tuple[str, str, str], float]:
    """Median seconds by phase, library and kind of batch."""
    rows = arguments.rows
    batches: dict[str, dict[str, Any]] = {
        "one": {},
        "block": {"adapter_names": [ADAPTERS[i * 4 // rows] for i in range(rows)]},
        "mixed": {"adapter_names": [ADAPTERS[i % 4] for i in range(rows)]},
    }
    models = {
        "ours": adapted(arguments, storage, qlora_kit, qlora_kit.apply_lora),
        "peft": adapted(arguments, storage, peft, peft.get_peft_model),
    }
    ids = torch.randint(0, 1024, (rows, arguments.words))
    times: dict[tuple[str, str, str], list[float]] = {}
    for library, model in models.items():
        with torch.no_grad():
            models[library] = (model, model(input_ids=ids, use_cache=True).past_key_values)
    for _ in range(arguments.repeats):
        for kind, names in batches.items():
            for library, (model, cache) in models.items():
                times.setdefault(("prefill", library, kind), []).append(step(model, ids, **names))
                for _ in range(arguments.decodes):
                    times.setdefault(("decode", library, kind), []).append(step(model, ids[:, :1], cache, **names))
    return {key: statistics.median(found) for key, found in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"rows": 32, "words": 64, "hidden": 512, "layers": 2, "repeats": 9, "decodes": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("storages", nargs="*", default=["nf4", "bfloat16"], help=f"of {list(STORAGES)}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"bitsandbytes {bitsandbytes.__version__}, peft {peft.__version__}, {arguments.rows} rows, four adapters")
    for storage in arguments.storages:
        found = measure(arguments, storage)
        for (phase, library, kind), seconds in sorted(found.items()):
            ratio = seconds / found[phase, library, "one"]
            print(f"{storage:8} {phase:7} {library} {kind:5} {1000 * seconds:8.1f} ms  {ratio:.2f} of one adapter's")


if __name__ == "__main__":
    main()
