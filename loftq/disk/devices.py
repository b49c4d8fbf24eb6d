"""Where units are worked on: on one device, on all GPUs of the machine in turn, or on that which is a process's own."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from queue import Queue

import torch

from qlora_kit.distributed.team import Team

from .task import Task


def devices_for(
    name: str, team: Team, *, gpus: int | None = None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The devices that ``name`` means for this process.

    Args:
        name: "auto" for all GPUs, or the CPU where there is none; "cuda" for the first; else a device's own name.
        team: its processes on one machine share the GPUs out among them, for "auto" and "cuda".
        gpus: how many the machine has; None asks torch.
        environment: has the process's number on its machine, as torchrun sets it.
    """
    count = torch.cuda.device_count() if gpus is None else gpus
    if name == "auto" and not count:
        return ("cpu",)
    if name not in ("auto", "cuda") or (name == "cuda" and (team.size == 1 or not count)):
        return (name,)
    if team.size > 1:
        return (f"cuda:{int(environment.get('LOCAL_RANK', team.rank)) % count}",)
    return tuple(f"cuda:{number}" for number in range(count))


class Devices:
    """The devices of ``task``; each is lent to ``task.workers`` units at a time."""

    def __init__(self, task: Task) -> None:
        self._free: Queue[str] = Queue()
        for _ in range(task.workers):
            for device in task.devices or (task.device,):
                self._free.put(device)

    @contextmanager
    def one(self) -> Iterator[str]:
        """A device that is free, or the next that is."""
        device = self._free.get()
        try:
            yield device
        finally:
            self._free.put(device)
