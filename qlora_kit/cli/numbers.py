"""Numbers as they are typed: sizes with their units, and lists with commas between."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from ..errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Plain bytes that are taken without "B".
_FEWEST = 2**10
# Digits of a size: more are no size of anything, and Python refuses thousands of them.
_DIGITS = 30


def parse_bytes(text: str, what: str = "size") -> int:
    """``"4GiB"``, ``"500MB"`` or plain bytes as a number, parts of a byte cut off.

    A plain number below ``_FEWEST`` is a size whose unit was forgotten: nobody means 12 bytes by ``--memory 12``.

    Args:
        what: begins the message.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(rf"\s*([0-9]{{0,{_DIGITS}}}\.?[0-9]{{1,{_DIGITS}}})\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS:
        raise ConfigError(f"{what}: expected a number with B, KB, MB, GB, KiB, MiB or GiB, found {text!r}; pass 4GiB")
    if not found[2] and Fraction(found[1]) < _FEWEST:
        raise ConfigError(f"{what}: expected a size with its unit, found {text!r}; pass {found[1]}GiB, or {found[1]}B")
    return int(Fraction(found[1]) * _UNITS[found[2].upper()])  # in floats, 1.005KB would be 1004 bytes


def gigabytes(size: float, what: str) -> int:
    """``size`` GB in bytes, at least one.

    Raises:
        ConfigError: NaN or infinite.
    """
    if not math.isfinite(size):
        raise ConfigError(f"{what}: expected a number of GB, found {size}; pass {what} 5")
    return max(1, int(size * 10**9))


def whole_numbers(text: str | None, what: str) -> tuple[int, ...]:
    """``"8,16,32"`` as numbers; none for None.

    Raises:
        ConfigError: something else is between the commas.
    """
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(re.fullmatch(rf"[0-9]{{1,{_DIGITS}}}", part) for part in parts):
        raise ConfigError(f"{what}: expected whole numbers with commas between, found {text!r}; pass {what} 8,16,32")
    return tuple(int(part) for part in parts)


def size_or_word(text: str | None) -> int | str | None:
    """``"64"`` as a number, "row" as it is."""
    return int(text) if text is not None and re.fullmatch(rf"[0-9]{{1,{_DIGITS}}}", text) else text
