"""Combining 4 adapters of rank 16 on one 2048 x 2048 layer: seconds, and how far the deltas are from peft's.

Run: python benchmarks/combine_speed.py
peft's add_weighted_adapter on the same factors in the same process runs next to each of ours, both through the
model's method, so checks, injection and reports are counted. One thread for both (or "--threads 2"): on a machine
that does other work too, threads that wait for each other are what is measured otherwise. "Apart" is
||ours - theirs|| / ||theirs||.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import qlora_kit

SIZE, RANK, COUNT = 2048, 16, 4
WEIGHTS = [0.4, 0.3, 0.2, 0.1]
NAMES = [f"a{i}" for i in range(COUNT)]
OURS, THEIRS = 7, 2  # repeats; the fewest seconds count
FIELDS: dict[str, dict[str, Any]] = {"svd": {}, "exact": {}, "ties_svd": {"density": 0.5}}


def fill(layers: list[Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in NAMES:
            for layer in layers:
                state = generator.get_state()
                for factor in (layer.lora_A[name].weight, layer.lora_B[name].weight):
                    factor.copy_(torch.randn(factor.shape, generator=generator))
                if layer is not layers[-1]:
                    generator.set_state(state)  # both libraries get the same


def models() -> tuple[qlora_kit.LoraModel, Any]:
    base = nn.Linear(SIZE, SIZE, bias=False)
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "target_modules": ["0"]}
    ours = qlora_kit.apply_lora(nn.Sequential(base), qlora_kit.LoraConfig(**fields), NAMES[0])
    theirs = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(**fields), NAMES[0])
    for name in NAMES[1:]:
        ours.add_adapter(name, qlora_kit.LoraConfig(**fields))
        theirs.add_adapter(name, peft.LoraConfig(**fields))
    fill([ours.adapter_layers()["0"], theirs.base_model.model[0]])
    return ours, theirs


def timed(model: Any, kind: str, repeats: int, delta: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """(fewest seconds, the new delta)."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model.add_weighted_adapter(NAMES, WEIGHTS, "new", kind, **FIELDS[kind])
        times.append(time.perf_counter() - began)
        found = delta()
        model.delete_adapter("new")
    return min(times), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    ours, theirs = models()
    layer, their_layer = ours.adapter_layers()["0"], theirs.base_model.model[0]
    print(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{COUNT} adapters of rank {RANK} on {SIZE} x {SIZE}\n")
    print(f"| type | peft {peft.__version__} s | qlora_kit s | faster | apart |\n| --- | ---: | ---: | ---: | ---: |")
    for kind in FIELDS:
        seconds, found = timed(ours, kind, OURS, lambda: layer.delta("new"))
        if kind == "exact":  # peft has no such type; the sum, of rank 64, is what its dense svd starts from
            expected = sum(w * their_layer.get_delta_weight(name) for w, name in zip(WEIGHTS, NAMES, strict=True))
            their_cells = "", ""
        else:
            their_seconds, expected = timed(theirs, kind, THEIRS, lambda: their_layer.get_delta_weight("new"))
            their_cells = f"{their_seconds:.3f}", f"{their_seconds / seconds:.0f}x"
        apart = (torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).item()
        print(f"| {kind} | {their_cells[0]} | {seconds:.4f} | {their_cells[1]} | {apart:.1e} |")


if __name__ == "__main__":
    main()
