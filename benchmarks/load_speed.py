"""How loading an adapter grows with the number of adapted modules: 384 to 3,072 small linears, peft in the same run.

Run: python benchmarks/load_speed.py
The linears are 4 x 4, so that what is measured is the walking, matching and building, not the copying. Each time is the
fewest seconds of three.
"""

from __future__ import annotations

import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import qlora_kit

REPEATS = 3
EXPERTS = 32
NAMES = ("gate_proj", "up_proj", "down_proj")


class Net(nn.Module):
    """``blocks`` blocks of 32 experts of three linears, as mixtures of experts have them."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        experts = [
            nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in NAMES}) for _ in range(EXPERTS * blocks)
        ]
        self.layers = nn.ModuleList([nn.ModuleList(experts[i : i + EXPERTS]) for i in range(0, len(experts), EXPERTS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def best_of(make: Callable[[], Any], function: Callable[[Any], object]) -> float:
    """Fewest seconds of ``function`` on what ``make`` gives."""
    times = []
    for _ in range(REPEATS):
        model = make()
        began = time.perf_counter()
        function(model)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(f"python {platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}, one thread")
    print("| modules | qlora_kit, s | peft, s | peft / qlora_kit |\n| ---: | ---: | ---: | ---: |")
    for blocks in (4, 8, 16, 32):
        with tempfile.TemporaryDirectory() as folder:
            config = qlora_kit.LoraConfig(r=2, target_modules=list(NAMES))
            qlora_kit.apply_lora(Net(blocks), config).save_pretrained(folder)

            def net(blocks: int = blocks) -> Net:
                return Net(blocks)

            ours = best_of(net, lambda model, folder=folder: qlora_kit.LoraModel.from_pretrained(model, folder))
            theirs = best_of(net, lambda model, folder=folder: peft.PeftModel.from_pretrained(model, folder))
        count = blocks * EXPERTS * len(NAMES)
        print(f"| {count:,} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |", flush=True)


if __name__ == "__main__":
    main()
