"""Error types. Every message names the module path or field, what was expected, what was found, and the fix."""

from __future__ import annotations

import difflib
import heapq
from collections.abc import Iterable

# By ``closest``: candidates compared letter by letter, and letters of a name.
_COMPARED, _LONGEST = 500, 300


class QLoRAKitError(Exception):
    """The base of every error raised by this toolkit."""


class ConfigError(QLoRAKitError, ValueError):
    """A configuration field has a value that can't work."""


class TargetError(QLoRAKitError, ValueError):
    """A target selects nothing, or something that can't be adapted."""


class UnsupportedModuleError(TargetError, TypeError):
    """A module's type has no codec or no layer family."""


class CodecError(QLoRAKitError, ValueError):
    """A base module's weight can't be read or written as asked."""


class AdapterError(QLoRAKitError, ValueError):
    """An adapter's name or state doesn't allow what was asked."""


class StorageError(QLoRAKitError, ValueError):
    """A file is missing, damaged, foreign, or doesn't fit the model."""


class MergeError(QLoRAKitError, ValueError):
    """A merge can't be carried out; the model is as it was."""


class ProcessesError(QLoRAKitError, RuntimeError):
    """Another process of a run of several has failed, is gone, or gives no sign.

    Attributes:
        spokesman: whether this process is the one that says so, of those that are left.
    """

    def __init__(self, message: str, *, spokesman: bool = False) -> None:
        super().__init__(message)
        self.spokesman = spokesman


class LeftOutWarning(UserWarning):
    """A choice of modules that sounds like all of the model leaves much of it without an adapter."""


def closest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` candidates that look most like ``name``, best first.

    Of thousands, and of names as long as a page, only a look at both ends tells which are compared letter by letter: a
    message may not take minutes.
    """
    names = sorted({candidate for candidate in candidates if len(candidate) <= _LONGEST})
    if len(name) > _LONGEST:
        return []
    if len(names) > _COMPARED:
        names = sorted(heapq.nsmallest(_COMPARED, names, key=lambda other: -_common_ends(name, other)))
    return difflib.get_close_matches(name, names, n=count, cutoff=0.3)


def _common_ends(one: str, other: str) -> int:
    """How many letters both begin and both end with."""
    most = min(len(one), len(other))
    begin = end = 0
    while begin < most and one[begin] == other[begin]:
        begin += 1
    while end < most and one[-1 - end] == other[-1 - end]:
        end += 1
    return begin + end
