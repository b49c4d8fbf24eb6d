"""Regular expressions of unknown origin, which are given a time to decide.

A pattern comes from an adapter's file as often as from its user, and ``(a+)+$`` takes longer on a path of forty letters
than anyone waits; ``.*.*.*.*.*.*.*.*x`` does so without nesting. No look at the pattern tells all that are slow from
those that aren't. With one repetition or choice at most there is nothing to try but where it ends, and Python's own
engine decides; else ``regex`` does, which means the same by what both know and can be stopped.

The time is one for all of them: a file may hold thousands of patterns, each just quick enough, and is asked about as
many paths. What is decided at once, as patterns of modules are, takes nothing of it.
"""

from __future__ import annotations

import contextlib
import re
import time
from importlib import import_module
from typing import Any

from ..errors import ConfigError

# For all patterns and paths together.
SECONDS = 2.0
# What a decision may take before it counts, and what it is given at least, since a thread may be made to wait as long.
_AT_ONCE, _LEAST = 1e-3, 0.01
# How much of each second that passes is given back, to a process that goes on after it has refused some.
_GIVEN_BACK = 0.1
# In one table of patterns that aren't plain names: they are asked one after the other about every path.
MOST = 2000
_CHOICES = re.compile(r"[*+{?|]")


class _Allowance:
    """The seconds that are left."""

    def __init__(self) -> None:
        self._left, self._at = SECONDS, time.monotonic()

    def left(self) -> float:
        now = time.monotonic()
        self._left, self._at = min(SECONDS, self._left + _GIVEN_BACK * (now - self._at)), now
        return self._left

    def take(self, seconds: float) -> None:
        self._left = max(0.0, self._left - seconds)


_ALLOWANCE = _Allowance()


class Expression:
    """A regular expression that whole paths are held against.

    Args:
        pattern: as Python's ``re`` knows them. name: of the field that it stands in, for messages.

    Raises:
        ConfigError: it isn't one.
    """

    def __init__(self, pattern: str, name: str = "pattern") -> None:
        self.pattern, self.name = pattern, name
        try:
            self._plain = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            said = str(error) if isinstance(error, re.error) else "it nests, or repeats, more than can be followed"
            raise ConfigError(
                f"{name}: expected a valid regular expression, found {_shown(pattern)}; correct it ({said})"
            ) from error
        self._bounded: Any = None
        if len(_CHOICES.findall(pattern)) > 1:
            regex: Any = import_module("regex")  # transformers needs it too
            with contextlib.suppress(regex.error):  # what only Python's own engine knows
                self._bounded = regex.compile(pattern, regex.VERSION0)

    def fullmatch(self, path: str) -> bool:
        """Whether the whole of ``path`` matches.

        Raises:
            ConfigError: it can't be decided in time.
        """
        return self._asked("fullmatch", path) is not None

    def group(self, path: str) -> str | None:
        """What the first group holds where the beginning of ``path`` matches, else None; raises as ``fullmatch``."""
        match = self._asked("match", path)
        return None if match is None else match[1]

    def _asked(self, how: str, path: str) -> Any:
        if self._bounded is None:
            return getattr(self._plain, how)(path)
        left, begun = _ALLOWANCE.left(), time.thread_time()
        found, in_time = None, True
        try:
            found = getattr(self._bounded, how)(path, timeout=max(left, _LEAST))
        except TimeoutError:
            in_time = False
        if (spent := time.thread_time() - begun) > _AT_ONCE:
            _ALLOWANCE.take(spent)
            in_time = in_time and spent < max(left, _AT_ONCE)
        if not in_time:
            raise ConfigError(
                f"{self.name}: expected a regular expression that can be decided in {SECONDS:g} seconds, with all "
                f"before it, found {_shown(self.pattern)}, which can't on {path!r}; write it with fewer repetitions, "
                "or list the names"
            )
        return found


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
