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
        ProcessesError: not all of them come within ``patience`` seconds; another has failed, or is gone.
    """
    size = int(environment.get("WORLD_SIZE", 1))
    if size < 2:
        yield ALONE
        return
    import torch.distributed as dist

    rank, own = int(environment["RANK"]), not dist.is_initialized()
    try:
        if own:
            dist.init_process_group("gloo", timeout=timedelta(seconds=max(patience, 60)))
        name = f"team{environment.get('TORCHELASTIC_RESTART_COUNT', 0)}-{next(_times)}"
        team = Processes(lambda: _store(name, environment, patience), rank, size, patience)
    except (RuntimeError, ValueError) as error:
        raise ProcessesError(
            f"processes: expected {size} of them to come together within {patience:.0f} s, found fewer ({error})",
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
        team.part()
        raise ProcessesError(f"{error}; {go_on}" if go_on else str(error), spokesman=error.spokesman) from error
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


def _store(name: str, environment: Mapping[str, str], patience: float) -> Any:
    """A connection to the store that the processes met at, with names of this team's own."""
    import torch.distributed as dist

    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=max(patience, 60)))
    return dist.PrefixStore(name, store)
