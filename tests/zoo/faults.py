"""Where the toolkit is known to fail on the zoo: a table that is to become empty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """A stage of some members' lives that fails today.

    Attributes:
        stage, members: which.
        error: the type of error that is met.
        what: what happens. right: what should.
    """

    stage: str
    members: tuple[str, ...]
    error: type[BaseException]
    what: str
    right: str


FAULTS: tuple[Fault, ...] = ()
