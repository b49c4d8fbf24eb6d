"""How a process finds the team that it was started into, and how a team's end is the end of all."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from ..errors import ProcessesError
from .team import ALONE, PATIENCE, Processes, Team

# Seconds that processes have to come together at least: they start one after the other on a busy machine.
_LEAST = 60.0
# How often this process has joined a team, which is as often as the others have.
_times = itertools.count()


@contextmanager
def joined(
    patience: float = PATIENCE, *, go_on: str = "", environment: Mapping[str, str] = os.environ
) -> Iterator[Team]:
    """The team that this process belongs to by its environment; alone if that names none.

    A gloo group of torch is set up for it, if there is none. An error that ends the block is told to the others; and
    torchrun ends the processes that are left when one has ended in an error, which is an error here that says so.

    Args:
        patience: seconds without a sign of another process after which it is taken to be gone.
        go_on: how one goes on afterwards, which ends the message of another process's failure.

    Raises:
        ProcessesError: not all of them come within ``patience`` seconds, or a minute; another has failed, or is gone;
            the environment says one thing of several processes and lacks another.
    """
    rank, size = _place(environment)
    if size < 2:
        yield ALONE
        return
    import torch.distributed as dist

    own, waited = not dist.is_initialized(), max(patience, _LEAST)
    try:
        if own:
            dist.init_process_group("gloo", timeout=timedelta(seconds=waited))
        name = f"team{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_times)}"
        team = Processes(lambda: _store(name, environment, patience), rank, size, patience)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"processes: expected {size} of them to come together within {waited:.0f} s, found fewer "
            f"({next(iter(str(error).splitlines()), '')})",
            spokesman=True,
        ) from error

    def told_to_end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise ProcessesError(team.reason() or "told to end, as torchrun does when another process has ended")

    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, told_to_end) if main else None
    try:
        yield team
        team.barrier()  # whoever keeps the store leaves last
    except ProcessesError as error:
        speaks = team.part() or error.spokesman
        raise ProcessesError(f"{error}; {go_on}" if go_on else str(error), spokesman=speaks) from error
    except BaseException as error:
        team.fail(error)
        team.part()
        raise
    finally:
        if main:
            signal.signal(signal.SIGTERM, handler)
        team.close()
        if own:
            with suppress(Exception):
                dist.destroy_process_group()


def _place(environment: Mapping[str, str]) -> tuple[int, int]:
    """This process's number, and how many there are."""
    said = environment.get("WORLD_SIZE", "1")
    if said.isdecimal() and int(said) < 2:
        return 0, 1
    fix = "start with torchrun, which sets all of them, or unset WORLD_SIZE for one process"
    for name in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        found = environment.get(name, "")
        if not found.isdecimal() or (name == "RANK" and int(found) >= int(said)):
            expected = f"a number below {said}" if name == "RANK" else "a number"
            raise ProcessesError(
                f"{name}: expected {expected} in the environment of one of several processes, found {found!r}; {fix}",
                spokesman=True,
            )
    if not environment.get("MASTER_ADDR"):
        raise ProcessesError(
            f"MASTER_ADDR: expected the machine of process 0 in the environment of one of {said} processes, found "
            f"nothing; {fix}",
            spokesman=True,
        )
    return int(environment["RANK"]), int(said)


def _store(name: str, environment: Mapping[str, str], patience: float) -> Any:
    """A connection to the store that the processes met at, with names of this team's own."""
    import torch.distributed as dist

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(patience, _LEAST)))
    return dist.PrefixStore(name, store)
