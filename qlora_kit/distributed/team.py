"""Processes that share one piece of work: who does what, what goes from one to another, and that none waits for ever.

torchrun, or whatever else sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, starts the processes.
They meet at a store of small values, which says who has come how far, and hand tensors over by gloo, in the memory of
the host: sums must be the same however many processes there are, and the devices have no part in that.

No collective is begun before all who take part have said in the store that they are there, so none blocks for as long
as another computes. What one waits for in the store, it waits for as long as the others live: each process has a thread
that gives a sign there. Whose sign doesn't change for ``patience`` seconds is taken to be gone; who fails says why.
Rejected: time limits on collectives, which can't tell a large layer from a dead process.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from ..checkpoints.pipeline import in_order
from ..errors import ProcessesError, QLoRAKitError
from .parcels import put_together, room_for, taken_apart

Item = TypeVar("Item")
Read = TypeVar("Read")
T = TypeVar("T")

#: Seconds without a sign of another process after which it is taken to be gone.
PATIENCE = 300.0
# Seconds that are waited without looking around, and the most between two looks into the store.
_MOMENT, _PAUSE = 0.5, 0.05
# Keys of what is said once, and seconds that others wait for process 0 to have heard of an error.
_FAILED, _PARTED, _SPOKEN, _PARTING = "failed", "parted", "spoken", 10.0


class Growing(Protocol):
    """A sum that goes from process to process."""

    def take(self, part: Any) -> None:
        """Add what one process has made."""


G = TypeVar("G", bound=Growing)


class Team:
    """One process alone; ``joined`` gives the team of a run of several.

    Attributes:
        rank, size: which process this is, of how many.
    """

    rank, size = 0, 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, and keeps the books."""
        return self.rank == 0

    def numbers(self, count: int) -> range:
        """Which of ``count`` things that come in order are this process's: they are dealt out in turn."""
        return range(self.rank, count, self.size)

    def from_rank(self, value: T, source: int = 0) -> T:
        """``value`` of the process ``source``, on all; tensors come to lie on the CPU there."""
        return value

    def gathered(self, value: T) -> list[T]:
        """The ``value`` of each process, on all; a few bytes."""
        return [value]

    def barrier(self) -> None:
        """Wait until all have come here."""

    def summed(self, count: int, make: Callable[[int], Any], total: G) -> G:
        """``total`` when it has taken ``make(i)`` of each i below ``count``, in this order whatever the team's size:
        ``numbers`` says which process makes which, and the total goes from one to the next."""
        for number in range(count):
            total.take(make(number))
        return total

    def shared(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Read],
        work: Callable[[Item, Read], T],
        *,
        size: Callable[[Item], int],
        workers: int = 1,
    ) -> Generator[tuple[Item, T]]:
        """``work(item, read(item))`` of each item: here in their order.

        In a team each item is worked on by one process, the largest first, whoever comes to take it; what comes of it
        is a small value, and process 0 has them all, in the items' order. The others have none.
        """
        return in_order(items, read, work, workers)


ALONE = Team()


class Processes(Team):
    """A team of several processes; see ``joined``.

    Args:
        store: gives a connection to the store, one of its own to each thread.
        rank, size: which process this is, of how many.
        patience: see ``PATIENCE``.

    Attributes:
        sent: bytes of tensors that this process has handed to another, or to all others at once.
    """

    def __init__(self, store: Callable[[], Any], rank: int, size: int, patience: float) -> None:
        self.rank, self.size, self.patience = rank, size, patience
        self._store = store()
        self._turn = self.sent = 0
        self._signs: dict[int, tuple[bytes, float]] = {}
        self._over = threading.Event()
        self._on_its_way: tuple[Any, ...] = ()
        self._beating = threading.Thread(target=self._beat, args=(store(),), daemon=True)
        self._beating.start()

    # -- the store ----------------------------------------------------------------------------------------------

    def _next(self) -> str:
        """A name for what all processes do now; they do the same things in the same order."""
        self._turn += 1
        return f"turn{self._turn}"

    def _wait(self, key: str, *, take: bool = False) -> bytes:
        """The value of ``key`` once it is there, while the others live; ``take`` it away then."""
        looked = time.monotonic()
        with self._lost():
            while not self._is_there(key):
                if self._store.check([_FAILED]):
                    raise self._failed()
                if time.monotonic() - looked > min(1.0, self.patience / 4):
                    looked = time.monotonic()
                    self._look_for_signs()
            value = self._store.get(key)
            if take:
                self._store.delete_key(key)
        return bytes(value)

    def _is_there(self, key: str, seconds: float = _MOMENT) -> bool:
        """Whether ``key`` is in the store, or comes there in so many seconds. The store's own wait would hear no signal
        meanwhile, and warn on the terminal each time that it ends without."""
        until, pause = time.monotonic() + seconds, 0.001
        while not self._store.check([key]):
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE)
        return True

    def _look_for_signs(self) -> None:
        now, gone = time.monotonic(), []
        for other in range(self.size):
            key = f"sign{other}"
            sign = bytes(self._store.get(key)) if self._store.check([key]) else b""
            before, since = self._signs.get(other, (None, now))
            if sign != before:
                self._signs[other] = sign, now
            elif now - since > self.patience and other != self.rank:
                gone.append(other)
        if gone:
            speaks = self.rank == min(set(range(self.size)) - set(gone))
            raise ProcessesError(
                f"process {gone[0]} of {self.size}: expected a sign of it, found none for {self.patience:.0f} s",
                spokesman=speaks,
            )

    def _beat(self, store: Any) -> None:
        number = 0
        with suppress(Exception):  # the store is gone with the process that kept it: the others will notice
            while True:
                store.set(f"sign{self.rank}", str(number))
                number += 1
                if self._over.wait(min(5.0, self.patience / 4)):
                    return

    def fail(self, error: BaseException) -> None:
        """Have the others end too, and process 0 say why; nothing if another was first."""
        text = str(error) if isinstance(error, QLoRAKitError) else f"{type(error).__name__}: {error}"
        with suppress(Exception):
            self._store.compare_set(_FAILED, "", f"{self.rank} {text}")

    def part(self) -> bool:
        """Leave after an error: process 0 first, so that it says why before torchrun ends it for another's exit.

        Returns:
            Whether this process has to speak for all, since process 0 is gone.
        """
        with suppress(Exception):
            if self.leads:
                self._store.set(_PARTED, b"")
            elif self._is_there(_PARTED, min(self.patience, _PARTING)):
                time.sleep(0.5)
            else:
                return bool(self._store.add(_SPOKEN, 1) == 1)
        return False

    def reason(self) -> str | None:
        """What a process that failed has said; None if none did."""
        with suppress(Exception):
            if self._store.check([_FAILED]):
                rank, _, text = bytes(self._store.get(_FAILED)).decode().partition(" ")
                return f"process {rank} of {self.size}: {text}"
        return None

    def _failed(self) -> ProcessesError:
        return ProcessesError(self.reason() or "another process failed")

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """What the store and gloo raise when a process is gone, in our words."""
        try:
            yield
        except QLoRAKitError:
            raise
        except RuntimeError as error:
            said = next(iter(str(error).splitlines()), "")
            raise ProcessesError(
                f"processes: expected all {self.size} of them at work, lost the connection to one ({said[:200]})",
                spokesman=True,
            ) from error

    def close(self) -> None:
        """Stop giving signs."""
        self._over.set()
        self._beating.join(1)

    # -- values -------------------------------------------------------------------------------------------------

    def from_rank(self, value: T, source: int = 0) -> T:
        import torch.distributed as dist

        key = self._next()
        if self.rank == source:
            head, tensors = taken_apart(value)
            self.sent += sum(tensor.nbytes for tensor in tensors)
            self._store.set(key, head)
            if tensors:
                for other in range(self.size):
                    if other != source:
                        self._wait(f"{key}/{other}", take=True)
        else:
            head = self._wait(key)
            tensors = room_for(head)
            if tensors:
                self._store.set(f"{key}/{self.rank}", b"here")
        with self._lost():
            for tensor in tensors:
                dist.broadcast(tensor, source)
        return value if self.rank == source else put_together(head, tensors)

    def gathered(self, value: T) -> list[T]:
        key = self._next()
        with self._lost():
            self._store.set(f"{key}/{self.rank}", pickle.dumps(value))
        return [pickle.loads(self._wait(f"{key}/{other}")) for other in range(self.size)]

    def barrier(self) -> None:
        self.gathered(None)

    def summed(self, count: int, make: Callable[[int], Any], total: G) -> G:
        import torch.distributed as dist

        key, before, after = self._next(), (self.rank - 1) % self.size, (self.rank + 1) % self.size
        for number in self.numbers(count):
            part = make(number)
            if number:
                head = self._wait(f"{key}/{number}", take=True)
                tensors = room_for(head)
                with self._lost():
                    for tensor in tensors:
                        dist.recv(tensor, before)
                total = put_together(head, tensors)
            self._arrived()
            total.take(part)
            del part
            if number + 1 < count:
                head, tensors = taken_apart(total)
                self.sent += sum(tensor.nbytes for tensor in tensors)
                with self._lost():
                    self._store.set(f"{key}/{number + 1}", head)
                    # What is sent stays as it is until it has arrived, which is before the total comes back.
                    self._on_its_way = (tensors, [dist.isend(tensor, after) for tensor in tensors])
        total = self.from_rank(total, (count - 1) % self.size)
        self._arrived()
        return total

    def _arrived(self) -> None:
        with self._lost():
            for sent in self._on_its_way[1] if self._on_its_way else ():
                sent.wait()
        self._on_its_way = ()

    def shared(
        self,
        items: Sequence[Item],
        read: Callable[[Item], Read],
        work: Callable[[Item, Read], T],
        *,
        size: Callable[[Item], int],
        workers: int = 1,
    ) -> Generator[tuple[Item, T]]:
        key, done = self._next(), 0
        order = sorted(range(len(items)), key=lambda k: (-size(items[k]), k))

        def taken() -> Iterator[int]:
            while True:
                with self._lost():
                    number = self._store.add(f"{key}/taken", 1) - 1
                if number >= len(order):
                    return
                yield order[number]

        # To have taken one more while others have nothing to do is no help.
        ahead = len(items) > 4 * self.size * workers
        own = in_order(taken(), lambda k: read(items[k]), lambda k, found: work(items[k], found), workers, ahead=ahead)
        try:
            for k, value in own:
                with self._lost():
                    self._store.set(f"{key}/{k}", pickle.dumps(value))
                    failed = self._store.check([_FAILED])
                if failed:
                    raise self._failed()
                while self.leads and done < len(items) and self._store.check([f"{key}/{done}"]):
                    yield items[done], pickle.loads(self._wait(f"{key}/{done}", take=True))
                    done += 1
            while self.leads and done < len(items):
                yield items[done], pickle.loads(self._wait(f"{key}/{done}", take=True))
                done += 1
        finally:
            own.close()
