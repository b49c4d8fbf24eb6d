"""What the ranks do in the tests of a team."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from qlora_kit.distributed.joining import joined
from qlora_kit.errors import ProcessesError


class Parts:
    """Takes whatever comes, in the order in which it comes."""

    def __init__(self) -> None:
        self.parts: list[Any] = []
        self.tensor = torch.zeros(3, dtype=torch.bfloat16)

    def take(self, part: Any) -> None:
        self.parts.append(part)
        self.tensor = self.tensor + 1


def values_go_around() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with joined(patience=30) as team:
        twice = torch.arange(4.0).bfloat16()
        value = {"a": twice, "b": [twice, torch.ones((2, 0))], "c": "text"} if team.rank == 1 else None
        found["from 1"] = got = team.from_rank(value, 1)
        found["one tensor"] = got is not None and got["a"] is got["b"][0]
        found["gathered"] = team.gathered(f"of {team.rank}")
        found["numbers"] = list(team.numbers(5))
        total = team.summed(5, lambda number: (number, team.rank), Parts())
        found["sum"] = total.parts, total.tensor
        found["no sum"] = team.summed(0, lambda number: number, Parts()).parts
        found["sum of one"] = team.summed(1, lambda number: number, Parts()).parts
        worked = team.shared(list(range(9)), str, lambda item, read: (read, team.rank), size=lambda item: item % 4)
        found["shared"] = list(worked)
    return found


def one_is_lost(folder: str) -> dict[str, Any]:
    """Rank 1 fails, and in another team gives no more signs and lives on, while rank 0 waits for it."""
    found: dict[str, Any] = {}
    try:
        with joined(patience=30, go_on="go on so") as team:
            if team.rank == 1:
                raise OSError("rank one's own words")
            list(team.shared([1, 2], str, lambda item, read: read, size=lambda item: item))
            team.barrier()
            team.barrier()
    except (ProcessesError, OSError) as error:
        found["failed"] = f"{type(error).__name__}: {error}"
    try:
        with joined(patience=2) as team:
            if team.rank == 1:
                team.close()  # no more signs of it
                while not (Path(folder) / "noticed").exists():
                    time.sleep(0.01)
                raise ProcessesError("was gone")
            team.barrier()
    except ProcessesError as error:
        found["gone"], found["spokesman"] = str(error), error.spokesman
        # Rank 1, for which a barrier would wait, ends only after this.
        (Path(folder) / "noticed").touch()
    return found
