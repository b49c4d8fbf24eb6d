"""Times between two events on the GPU's own stream, and the most memory that its allocator gave out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


def seconds(run: Run, device: str) -> float:
    """Of one call, from an idle device to an idle device."""
    if device != "cuda":
        began = time.process_time()
        run()
        return time.process_time() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(runs: dict[str, Run], repeats: int, device: str, warm_up: int = 3) -> dict[str, float]:
    """The median seconds of each, after a warm-up, one repetition of all after another."""
    for run in runs.values():
        for _ in range(warm_up if device == "cuda" else 1):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return {name: statistics.median(taken) for name, taken in times.items()}


def peak_bytes(run: Run, device: str) -> int:
    """The most that ``run`` had allocated above what was there before; 0 where nobody counts."""
    if device != "cuda":
        run()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
