"""Names that mean the last whole components of a path: ``q_proj`` and ``0.self_attn.q_proj``, never a part of a name.

Asked of many paths at once, by tables of all their suffixes, so that a thousand names over a thousand paths cost two
thousand look-ups.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from ..errors import ConfigError
from .expressions import MOST, Expression

T = TypeVar("T")

_PLAIN = re.compile(r"[\w.-]+")


def ends_with(path: str, name: str) -> bool:
    """Whether ``name`` is ``path`` or its last whole components."""
    return path == name or path.endswith(f".{name}")


def suffixes(path: str) -> Iterator[str]:
    """``path``'s last component, its last two, ..., and ``path`` itself."""
    start = len(path)
    while (start := path.rfind(".", 0, start)) >= 0:
        yield path[start + 1 :]
    yield path


class Suffixes:
    """Paths by all names that mean them; ``name in suffixes`` says whether any path ends with ``name``."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = list(dict.fromkeys(paths))
        self._by_name: dict[str, list[str]] = {}
        for path in self.paths:
            for name in suffixes(path):
                self._by_name.setdefault(name, []).append(path)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def of(self, name: str) -> list[str]:
        """The paths that end with ``name``."""
        return self._by_name.get(name, [])

    def matching(self, names: Iterable[str]) -> list[str]:
        """The paths that end with one of ``names``, in their own order, each once."""
        found = {path for name in names for path in self.of(name)}
        return [path for path in self.paths if path in found] if found else []

    def apart(self, paths: Iterable[str]) -> set[str]:
        """The shortest names that mean each of ``paths`` and none of these; a whole path where there is no other."""
        return {next((name for name in suffixes(path) if name not in self), path) for path in paths}


class Patterns(Generic[T]):
    """Values by pattern, the first that fits a path counting: a plain name (its last components) or a regex for them.

    A plain name is of word characters, dots and hyphens; a dot in it is a dot.

    Raises:
        ConfigError: a pattern is no regular expression, or there are thousands that are no plain names.
    """

    def __init__(self, patterns: Mapping[str, T]) -> None:
        self._values = list(patterns.values())
        self._plain: dict[str, int] = {}
        self._expressions: list[tuple[int, Expression]] = []
        for place, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                self._plain[pattern] = place
            else:
                self._expressions.append((place, Expression(rf"(?:.*\.)?(?:{pattern})", pattern)))
            if len(self._expressions) > MOST:
                raise ConfigError(
                    f"patterns: expected at most {MOST:,} regular expressions, found more among {len(patterns):,} "
                    "(of rank_pattern, alpha_pattern or the like); use plain names, which may be any number"
                )

    def value(self, path: str, default: T) -> T:
        """The value of the first pattern that fits ``path``."""
        places = [self._plain[name] for name in suffixes(path) if name in self._plain] if self._plain else []
        first = min(places, default=len(self._values))
        for place, expression in self._expressions:
            if place > first:
                break
            if expression.fullmatch(path):
                return self._values[place]
        return self._values[first] if places else default


def pattern_value(path: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first of ``patterns`` that fits ``path``; for many paths make ``Patterns`` once."""
    return Patterns(patterns).value(path, default)
