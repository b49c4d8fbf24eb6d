"""Packed linear layers against dense ones of the same shape: forward, and forward and backward, on a CPU.

Run: python benchmarks/packed_linear.py [--shapes 4096x4096 512x512] [--rows 1 8 256] [--types signed2 nf4]

Processor time of one thread, the median of interleaved repeats, so that other work on the machine falls on all alike.
"read" reads the whole weight in float32, casts it, multiplies with it and lets it go, as any codec can. The ratios
are to the dense layer in the same dtype, and to the dense one in float32.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_kit.codecs import codec_for
from qlora_kit.codecs.packed import PackedLinear, pack_linear
from qlora_kit.codecs.quantized import quantize_matrix


class ReadAndCast(torch.autograd.Function):
    """The weight read whole in float32 and cast, in the forward and again in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return F.linear(x, codec_for(module).read(module).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ codec_for(ctx.module).read(ctx.module).to(grad.dtype), None


def forward_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(x)

    return run


def both_of(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    x = x.clone().requires_grad_()
    grad = torch.randn_like(function(x.detach()))
    return lambda: torch.autograd.grad(function(x), x, grad)


def medians(runs: dict[str, Callable[[], object]], repeats: int, most_seconds: float = 6.0) -> dict[str, float]:
    """Seconds of each; what takes long is repeated less."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat, (name, run) in itertools.product(range(repeats), runs.items()):
        if repeat and sum(times[name]) > most_seconds:
            continue
        began = time.process_time()
        run()
        times[name].append(time.process_time() - began)
    return {name: statistics.median(taken[1:] or taken) for name, taken in times.items()}


def measure(shape: tuple[int, int], rows: int, quant_type: str, dtype: torch.dtype, args: argparse.Namespace) -> None:
    linear = nn.Linear(shape[1], shape[0], bias=False)
    packed = pack_linear(linear, quantize_matrix(linear.weight.detach(), quant_type, double_quant=True))
    weight, half = linear.weight.detach(), linear.weight.detach().to(dtype)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"packed": packed}
    if args.read:
        functions["read"] = lambda x: ReadAndCast.apply(x, packed)
    functions |= {"dense": lambda x: F.linear(x, half), "float32": lambda x: F.linear(x.float(), weight)}
    x = torch.randn(rows, shape[1], dtype=dtype)
    for part, of in (("forward", forward_of), ("forward + backward", both_of)):
        if args.forward_only and part != "forward":
            continue
        found = medians({name: of(function, x) for name, function in functions.items()}, args.repeats)
        packed_time = found["packed"]
        row = [f"{shape[0]}x{shape[1]}", str(rows), quant_type, part, *(f"{1e3 * t:.1f}" for t in found.values())]
        row += [f"{packed_time / found[name]:.2f}" for name in found if name != "packed"]
        print("| " + " | ".join(row) + " |", flush=True)


def shape_of(text: str) -> tuple[int, int]:
    out, fan_in = text.split("x")
    return int(out), int(fan_in)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=shape_of, default=[(512, 512), (4096, 4096), (4096, 11008)])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 256, 1024])
    parser.add_argument("--types", nargs="+", default=["signed2", "trellis2", "signed3", "trellis3", "nf4", "uniform8"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--read", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--forward-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ["packed", *(["read"] if args.read else []), args.dtype, "float32"]
    heads = ["out x in", "rows", "type", "", *(f"{name} ms" for name in names), *(f"to {name}" for name in names[1:])]
    print("| " + " | ".join(heads) + " |\n" + "| --- " * len(heads) + "|")
    for shape, rows, quant_type in itertools.product(args.shapes, args.rows, args.types):
        measure(shape, rows, quant_type, getattr(torch, args.dtype), args)


if __name__ == "__main__":
    main()
