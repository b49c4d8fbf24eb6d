"""What it costs before the first forward, against peft in the same run: import, injection, loading, saving, switching.

Run: python benchmarks/start_up.py [import] [life] [llama] [experts]
         [--modules 768 1536 3072 6144] [--repeats 5] [--peft-up-to 3072]

import   ``import qlora_kit`` beyond torch's own import, and peft's, in fresh processes
life     all that an adapter goes through, by the number of adapted modules: linears of 4 x 4, so that what is measured
         is walking, matching and building, not copying; without peft, whose time grows faster than the modules, above
         a number
llama    adapters on the 224 linears of a 7B-shaped Llama on the meta device: time, and memory at its peak
experts  adapters on 4,992 linears of a mixture whose experts are modules of their own

One thread; processor time of this process; each repetition makes both models anew and times ours and peft's one after
the other; medians.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import qlora_kit

EXPERTS = 32
NAMES = ["gate_proj", "up_proj", "down_proj"]
#: What is timed, in this order, on one model: the name of a step and what it does to the adapted model.
STEPS: dict[str, Callable[[Any, Any, Path], object]] = {
    "save_pretrained": lambda model, config, folder: model.save_pretrained(folder / "again"),
    "add_adapter": lambda model, config, folder: model.add_adapter("second", config),
    "load_adapter": lambda model, config, folder: model.load_adapter(folder, "third"),
    "set_adapter": lambda model, config, folder: model.set_adapter("second"),
    "disable_adapter": lambda model, config, folder: switched(model),
    "delete_adapter": lambda model, config, folder: model.delete_adapter("second"),
    "state_dict": lambda model, config, folder: model.state_dict(),
    "train, eval": lambda model, config, folder: model.train().eval(),
}


class Net(nn.Module):
    """``modules`` linears in blocks of 32 experts of three, as mixtures of experts had them."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        experts = [
            nn.ModuleDict({name: nn.Linear(4, 4, bias=False) for name in NAMES}) for _ in range(modules // len(NAMES))
        ]
        self.layers = nn.ModuleList([nn.ModuleList(experts[i : i + EXPERTS]) for i in range(0, len(experts), EXPERTS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def switched(model: Any) -> None:
    with model.disable_adapter():
        pass


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    began = time.process_time()
    result = function()
    return time.process_time() - began, result


def steps_of(net: nn.Module, toolkit: Any, folder: Path) -> Iterator[tuple[str, float]]:
    """Each step of an adapter's life on ``net`` and its seconds; ``folder`` has a stored adapter."""
    config = toolkit.LoraConfig(r=2, target_modules=NAMES)
    apply = qlora_kit.apply_lora if toolkit is qlora_kit else peft.get_peft_model
    taken, model = seconds(lambda: apply(net, config))
    yield "injection", taken
    for name, step in STEPS.items():
        yield name, seconds(lambda step=step: step(model, config, folder))[0]
    taken, net = seconds(model.unload)
    yield "unload", taken
    load = (qlora_kit.LoraModel if toolkit is qlora_kit else peft.PeftModel).from_pretrained
    yield "from_pretrained", seconds(lambda: load(net, folder))[0]


def life(modules: list[int], repeats: int, peft_up_to: int) -> None:
    cells: dict[str, list[str]] = {}
    for count in modules:
        toolkits = [qlora_kit, peft] if count <= peft_up_to else [qlora_kit]
        found: dict[Any, dict[str, list[float]]] = {toolkit: {} for toolkit in toolkits}
        with tempfile.TemporaryDirectory() as folder:
            stored = qlora_kit.LoraConfig(r=2, target_modules=NAMES)
            qlora_kit.apply_lora(Net(count), stored).save_pretrained(folder)
            for _ in range(repeats):
                for toolkit, steps in found.items():
                    for name, taken in steps_of(Net(count), toolkit, Path(folder)):
                        steps.setdefault(name, []).append(taken)
        for name in found[qlora_kit]:
            medians = [statistics.median(steps[name]) for steps in found.values()]
            ratio = [f"{medians[0] / medians[1]:.2f}"] if len(medians) > 1 else []
            cells.setdefault(name, []).append(", ".join([f"{taken * 1e3:,.0f}" for taken in medians] + ratio))
        print(f"{count:,} modules: from_pretrained {cells['from_pretrained'][-1]}", flush=True)
    print("| milliseconds: ours, peft, ratio | " + " | ".join(f"{count:,}" for count in modules) + " |")
    print("| --- |" + " ---: |" * len(modules))
    for name, row in cells.items():
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)


def imports(repeats: int) -> None:
    """Processor seconds of a fresh process from torch loaded to the package loaded."""
    script = "import time, torch; began = time.process_time(); import {}; print(time.process_time() - began)"
    for package in ("qlora_kit", "qlora_kit.compat.peft", "peft"):
        command = [sys.executable, "-c", script.format(package)]
        taken = [float(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats)]
        print(f"import {package:22} {statistics.median(taken):6.3f} s (least {min(taken):.3f})", flush=True)


def llama_7b() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def ours(model: nn.Module) -> Any:
    return qlora_kit.apply_lora(model, qlora_kit.LoraConfig(r=16, target_modules="all-linear"))


def theirs(model: nn.Module) -> Any:
    config = peft.LoraConfig(r=16, target_modules="all-linear")
    return peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def mixture() -> nn.Module:
    """4,992 linears, and a head; 1,664 experts of three in 52 blocks."""
    with torch.device("meta"):
        return nn.ModuleDict({"model": Net(4992), "lm_head": nn.Linear(4, 8)})


def theirs_by_name(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules=NAMES), low_cpu_mem_usage=True)


def injection(title: str, make: Callable[[], nn.Module], others: Callable[[nn.Module], Any], repeats: int) -> None:
    times: dict[Callable[[nn.Module], Any], list[float]] = {ours: [], others: []}
    peaks: dict[Callable[[nn.Module], Any], int] = {}
    for _ in range(repeats):
        for adapt, taken in times.items():
            model = make()
            taken.append(seconds(lambda adapt=adapt, model=model: adapt(model))[0])
    for adapt in times:
        model = make()
        tracemalloc.start()
        adapt(model)
        peaks[adapt] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    own, other = statistics.median(times[ours]), statistics.median(times[others])
    print(
        f"{title}: {own * 1e3:,.0f} ms, peft {other * 1e3:,.0f} ms, ratio {own / other:.2f}; at its peak "
        f"{peaks[ours] / 2**20:.1f} MiB of Python's memory, peft {peaks[others] / 2**20:.1f} MiB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["import", "life", "llama", "experts"])
    parser.add_argument("--modules", nargs="*", type=int, default=[768, 1536, 3072, 6144])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peft-up-to", type=int, default=3072)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}; {arguments.repeats} repetitions"
    )
    if "import" in arguments.parts:
        imports(arguments.repeats)
    if "life" in arguments.parts:
        life(arguments.modules, arguments.repeats, arguments.peft_up_to)
    if "llama" in arguments.parts:
        injection("7B-shaped Llama, 224 linears", llama_7b, theirs, arguments.repeats)
    if "experts" in arguments.parts:
        injection("mixture, 4,992 linears", mixture, theirs_by_name, arguments.repeats)


if __name__ == "__main__":
    main()
