"""Work on one tensor while the next is read: reading, computing and writing overlap, and memory stays bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Unit = TypeVar("Unit")
Read = TypeVar("Read")
Made = TypeVar("Made")


def in_order(
    units: Iterable[Unit],
    read: Callable[[Unit], Read],
    work: Callable[[Unit, Read], Made],
    workers: int = 1,
    *,
    ahead: bool = True,
) -> Generator[tuple[Unit, Made]]:
    """``work(unit, read(unit))`` of each unit, in their order.

    One thread reads and ``workers`` work, while the caller has the result before. At most ``workers + 1`` units are
    underway, and no more than ``workers`` without ``ahead``, for units that others take from too. An error of either
    ends the generator there; closing it early abandons what is underway.
    """
    waiting: deque[tuple[Unit, Future[Made]]] = deque()
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(workers) as pool:

        def done(unit: Unit, what: Future[Read]) -> Made:
            return work(unit, what.result())

        try:
            for unit in units:
                waiting.append((unit, pool.submit(done, unit, reader.submit(read, unit))))
                if len(waiting) >= workers + ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
                    del future
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
                del future
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
