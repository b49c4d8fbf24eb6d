"""Moments of a part of the inputs beside those of all: what is found from the one can be held against the rest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qlora_kit.errors import ConfigError

from .checks import checked_cross, checked_shortfall, checked_statistics


@dataclass(frozen=True)
class Half:
    """Moments of about half of the inputs that a layer's are of.

    Attributes:
        statistics, cross: float32 (in, in) E[x^ x^^T] and E[x x^^T].
        share: of all inputs, those that these are, above 0 and below 1.
        shortfall: float32 (out, in) E[(h - h^) x^^T], where the whole's is known.
    """

    statistics: Tensor
    cross: Tensor
    share: float
    shortfall: Tensor | None = None


def checked_half(half: Half | None, weight: Tensor) -> Half | None:
    """``half`` in float32 on the weight's device.

    Raises:
        ConfigError: its moments can't be those of this weight's inputs, or its share isn't of a part.
    """
    if half is None:
        return None
    statistics, cross = checked_statistics(half.statistics, weight), checked_cross(half.cross, weight)
    if statistics is None or statistics.dim() != 2 or cross is None or not 0 < half.share < 1:
        raise ConfigError(
            f"half: expected full moments (in, in) of a share of the inputs between 0 and 1, found "
            f"{tuple(half.statistics.shape)} of {half.share!r}; collect them with the whole's"
        )
    return Half(statistics, cross, half.share, checked_shortfall(half.shortfall, weight))
