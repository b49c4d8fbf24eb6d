"""Where the toolkit is known to fail on the zoo: a table that is to become empty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """Stages of some members' lives that fail today.

    Attributes:
        stages, members: which; each of these stages of each of these members.
        error: the type of error that is met there.
        what: what happens. right: what should.
    """

    stages: tuple[str, ...]
    members: tuple[str, ...]
    error: type[BaseException]
    what: str
    right: str


FAULTS: tuple[Fault, ...] = (
    Fault(
        ("4 bits",),
        ("rwkv",),
        AssertionError,
        "in eval transformers quantizes its 4-bit output layers anew, in another type: a merge before that differs",
        "the layers keep the values that they were loaded with",
    ),
)
