"""A training step beside the frozen base's: time of forward and backward, and the bytes kept between the two.

For the frozen base, peft, our plain form and our fused one (the default), and on storage of few bits without dropout
our merge-aware layers, which round their weights anew in each step: every storage, with and without dropout, on a
Llama of 4 layers (hidden size 512, 1,024 tokens) or one layer of a 7B shape (4096 / 11008, 256 tokens).

Run: python benchmarks/train_step.py [--shape tiny|7b] [--storages nf4 bf16 ...] [--ranks 16] [--dropouts 0 0.05]
One thread. Times are of the processor, medians of repetitions in which all take turns. Bytes are those of the tensors
that autograd saves, each storage once, parameters and buffers left out, the loss's own left out too: exact. The rounded
weights that merge-aware layers keep in their storage aren't among them. All are given inputs that want a gradient, as
layers inside a model are.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
import warnings
from contextlib import nullcontext
from typing import Any

import bitsandbytes
import peft
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit
from qlora_kit.kernels.native import product_dtype

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: By name: the bits that linears are brought to (None: dense), and the dtype of everything else.
STORAGES: dict[str, tuple[int | None, torch.dtype]] = {
    "float32": (None, torch.float32),
    "bf16": (None, torch.bfloat16),
    "nf4": (4, torch.float32),
    "nf4-bf16": (4, torch.bfloat16),
    "int8": (8, torch.float32),
    "2bit": (2, torch.float32),
    "2bit-bf16": (2, torch.bfloat16),
}
SHAPES = {
    "tiny": ({"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}, 1024),
    "7b": ({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32}, 256),
}


def base(shape: str, storage: str) -> nn.Module:
    bits, dtype = STORAGES[storage]
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, attn_implementation="sdpa", **SHAPES[shape][0])
    model = LlamaForCausalLM(config).to(dtype).model  # the layers alone: a head's cost is the same for all
    if bits is not None:
        qlora_kit.quantize_(model, bits)
    return model.requires_grad_(False).train()


def contestants(shape: str, storage: str, rank: int, dropout: float) -> dict[str, tuple[str, Any]]:
    settings = {"r": rank, "target_modules": LINEARS, "lora_dropout": dropout, "init_lora_weights": False}
    theirs = peft.get_peft_model(base(shape, storage), peft.LoraConfig(**settings)).train()  # factors in float32 too
    ours = qlora_kit.apply_lora(base(shape, storage), qlora_kit.LoraConfig(**settings)).train()
    entrants: dict[str, tuple[str, Any]] = {
        "frozen base": ("auto", base(shape, storage)),
        "peft": ("auto", theirs),
        "ours, plain": ("plain", ours),
        "ours": ("auto", ours),
    }
    if STORAGES[storage][0] is not None and not dropout:
        aware = qlora_kit.LoraConfig(**settings, merge_aware="same")
        entrants["ours, merge-aware"] = ("auto", qlora_kit.apply_lora(base(shape, storage), aware).train())
    return entrants


def step(model: Any, x: Tensor, grad: Tensor) -> float:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1)  # as an optimizer's step leaves it: written to
    began = time.process_time()
    model(inputs_embeds=x, use_cache=False).last_hidden_state.backward(grad)
    return time.process_time() - began


def kept_bytes(model: Any, x: Tensor) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    found: dict[int, tuple[int, Tensor]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(inputs_embeds=x, use_cache=False)
    del out
    return sum(size for size, _ in found.values())


def measured(shape: str, storage: str, rank: int, dropout: float, repeats: int, tokens: int) -> None:
    dtype = STORAGES[storage][1]
    hidden = SHAPES[shape][0]["hidden_size"]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, tokens, hidden, generator=generator).to(dtype).requires_grad_()
    grad = torch.randn(1, tokens, hidden, generator=generator).to(dtype)
    entrants = contestants(shape, storage, rank, dropout)
    times: dict[str, list[float]] = {name: [] for name in entrants}
    for repetition in range(repeats + 1):
        for name, (form, model) in entrants.items():
            with qlora_kit.set_branch(form) if form != "auto" else nullcontext():
                seconds = step(model, x, grad)
            if repetition:  # the first finds its memory and kernels
                times[name].append(seconds)
    floor, floor_bytes = statistics.median(times["frozen base"]), 0
    for name, (form, model) in entrants.items():
        with qlora_kit.set_branch(form) if form != "auto" else nullcontext():
            size = kept_bytes(model, x)
        floor_bytes = floor_bytes or size
        seconds = statistics.median(times[name])
        print(
            f"| {storage} | {rank} | {dropout:g} | {name} | {seconds:.3f} | {seconds / floor:.2f} | "
            f"{size / 1e6:.1f} | {size / floor_bytes:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=["nf4"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[16])
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.05])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="in place of the shape's own number")
    arguments = parser.parse_args()
    tokens = arguments.tokens or SHAPES[arguments.shape][1]
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    native = "has" if product_dtype("cpu", torch.bfloat16) == torch.bfloat16 else "has no"
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, bitsandbytes {bitsandbytes.__version__}; shape {arguments.shape}, {tokens} tokens; "
        f"this CPU {native} bfloat16 instructions; {arguments.repeats} repetitions\n"
    )
    print("| storage | r | dropout | | s | x frozen | MB kept | x frozen |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for storage in arguments.storages:
        for rank in arguments.ranks:
            for dropout in arguments.dropouts:
                measured(arguments.shape, storage, rank, dropout, arguments.repeats, tokens)


if __name__ == "__main__":
    main()
