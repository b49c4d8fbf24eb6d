"""What the ranks do in the tests of ``processes``."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist


def total(value: float) -> torch.Tensor:
    mine = torch.tensor([value * (dist.get_rank() + 1)])
    dist.all_reduce(mine)
    return mine


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one's own words")
    dist.barrier()


def one_dies() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(600)
