"""How much faster is LoftQ's alternation here than as published, and is it as good?

The reference loop is the published one on the same CPU: bitsandbytes quantizes and dequantizes, torch.linalg.svd
decomposes, five times. Ours is ``loftq.factorize`` on the same weight in the same run. "Reduction kept" is the part
of the reference's error reduction (from the plainly quantized weight's error to the last step's) that ours reaches.

Run: python benchmarks/loftq_speed.py [--shapes 1024x1024,2048x2048,4096x4096,11008x4096] [--no-growth] [--device cuda]
The whole takes about ten minutes on 2 cores, nearly all of it in the reference.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from loftq import factorize
from qlora_kit.codecs.packing import pack
from qlora_kit.codecs.quantized import quantize_matrix
from qlora_kit.lowrank import truncated_svd

RANK, STEPS = 64, 5


def weight(out_features: int, in_features: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(out_features, in_features, generator=generator) * 0.02).to(device)


def reference(full: torch.Tensor, rank: int, steps: int) -> list[float]:
    """The published loop at scaling 1; the relative error after each step, the plain rounding's first."""
    size = full.norm()
    branch = torch.zeros_like(full)
    errors = []
    for step in range(steps):
        packed, state = quantize_4bit(full - branch, blocksize=64, quant_type="nf4")
        residual = full - dequantize_4bit(packed, state)
        if step == 0:
            errors.append(float(residual.norm() / size))
        U, S, Vh = torch.linalg.svd(residual, full_matrices=False)
        branch = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        errors.append(float((residual - branch).norm() / size))
    return errors


def timed(function: Callable[[], Any], device: str, repeats: int = 1) -> tuple[float, Any]:
    """(fewest seconds, result)."""
    times, result = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        result = function()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times), result


def compare(shapes: list[tuple[int, int]], device: str) -> None:
    print(f"\nNF4, r = {RANK}, T = {STEPS}; seconds of the reference once, of ours the best of 3\n")
    print("| weight | reference s | ours s | faster | plain error | reference | ours | reduction kept |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for shape in shapes:
        full = weight(*shape, device)
        factorize(full, RANK, steps=1)  # threads and tables are there for both
        ours, result = timed(lambda full=full: factorize(full, RANK, steps=STEPS), device, 3)
        theirs, errors = timed(lambda full=full: reference(full, RANK, STEPS), device)
        kept = (errors[0] - result.error) / (errors[0] - min(errors))
        print(
            f"| {shape[0]} x {shape[1]} | {theirs:.2f} | {ours:.3f} | {theirs / ours:.1f}x | {errors[0]:.5f} | "
            f"{min(errors):.5f} | {result.error:.5f} | {kept:.4f} |",
            flush=True,
        )


def quantizing(device: str) -> None:
    """A 4096 x 4096 weight to packed NF4 codes and scales, and how close the two come."""
    full = weight(4096, 4096, device)

    def ours() -> torch.Tensor:
        return pack(quantize_matrix(full, "nf4").codes, 4, first_high=True)

    theirs_s, (theirs, _) = timed(lambda: quantize_4bit(full, blocksize=64, quant_type="nf4"), device, 7)
    ours_s, packed = timed(ours, device, 7)
    same = torch.equal(packed, theirs.reshape(-1))
    print(
        f"\nquantizing 4096 x 4096 to NF4, packed: bitsandbytes {theirs_s * 1e3:.0f} ms, ours {ours_s * 1e3:.0f} ms, "
        f"{theirs_s / ours_s:.1f}x; the same bytes: {same}"
    )


def solvers(device: str) -> None:
    """One decomposition of a 2048 x 2048 NF4 residual: time, and captured energy over the optimum."""
    full = weight(2048, 2048, device)
    residual = full - quantize_matrix(full, "nf4").dequantize()
    exact_s, (_, S, _) = timed(lambda: truncated_svd(residual, RANK, solver="full"), device)
    best = float(S.double().square().sum())
    print("\n| solver of a 2048 x 2048 residual, r = 64 | seconds | captured energy / optimum |\n| --- | ---: | ---: |")
    print(f"| full | {exact_s:.2f} | 1 |")
    ways = [("gram", None), *((name, depth) for name in ("krylov", "subspace") for depth in (4, 6, 8))]
    for solver, depth in ways:
        seconds, (U, _, _) = timed(
            lambda s=solver, d=depth: truncated_svd(residual, RANK, solver=s, depth=d), device, 3
        )
        energy = float((U.double().T @ residual.double()).square().sum())
        print(f"| {solver}{f', depth {depth}' if depth else ''} | {seconds:.3f} | {energy / best:.4f} |", flush=True)


def growth(device: str) -> None:
    """How our cost grows with the size, the rank and the steps, one at a time around 2048, 64 and 5."""
    print("\n| n x n | r | T | seconds |\n| ---: | ---: | ---: | ---: |")
    points = [(n, 64, 5) for n in (1024, 2048, 4096, 8192)]
    points += [(2048, r, 5) for r in (8, 16, 32, 128)] + [(2048, 64, t) for t in (1, 2, 10)]
    for n, r, t in points:
        full = weight(n, n, device)
        seconds, _ = timed(lambda full=full, r=r, t=t: factorize(full, r, steps=t), device, 3)
        print(f"| {n} | {r} | {t} | {seconds:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="1024x1024,2048x2048,4096x4096,11008x4096")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-growth", action="store_true")
    options = parser.parse_args()
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"{torch.get_num_threads()} CPU threads"
    versions = f"torch {torch.__version__}, bitsandbytes {bitsandbytes.__version__}"
    print(f"python {platform.python_version()}, {versions}, {where}")
    quantizing(options.device)
    solvers(options.device)
    if not options.no_growth:
        growth(options.device)
    compare(shapes, options.device)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
