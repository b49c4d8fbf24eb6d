"""Refusing what can be no second moments of a weight's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError


def check_moments(moments: Tensor) -> None:
    """Refuse what can be no second moments (in, in), nor their diagonal (in,), at a glance.

    Raises:
        ConfigError: an entry isn't finite, or one of the diagonal is negative.
    """
    diagonal = moments if moments.dim() == 1 else moments.diagonal()
    if not moments.isfinite().all() or (diagonal < 0).any():
        raise ConfigError(
            "statistics: expected finite second moments with a diagonal of at least 0, found NaN, infinity or a "
            "negative mean square; collect them in float32 or better"
        )


def checked_cross(cross: Tensor | None, weight: Tensor) -> Tensor | None:
    """``cross`` in float32 on the weight's device. Raises ConfigError if its shape or values can't be."""
    width = weight.shape[1]
    return _checked("cross", "E[x x^^T]", (width, width), cross, weight)


def checked_shortfall(shortfall: Tensor | None, weight: Tensor) -> Tensor | None:
    """``shortfall`` in float32 on the weight's device. Raises ConfigError if its shape or values can't be."""
    return _checked("shortfall", "E[(h - h^) x^^T]", tuple(weight.shape), shortfall, weight)


def _checked(name: str, what: str, shape: tuple[int, ...], moments: Tensor | None, weight: Tensor) -> Tensor | None:
    if moments is None:
        return None
    if tuple(moments.shape) != shape or not moments.float().isfinite().all():
        raise ConfigError(
            f"{name}: expected finite moments {what} of shape {shape} for a weight {tuple(weight.shape)}, found "
            f"{tuple(moments.shape)} or values that aren't finite; collect them in both models at this layer"
        )
    return moments.detach().to(weight.device, torch.float32)


def checked_statistics(statistics: Tensor | None, weight: Tensor) -> Tensor | None:
    """``statistics`` in float32 on the weight's device.

    Raises:
        ConfigError: they can't be second moments of this weight's inputs.
    """
    if statistics is None:
        return None
    width = weight.shape[1]
    if tuple(statistics.shape) not in ((width,), (width, width)):
        raise ConfigError(
            f"statistics: expected second moments of shape ({width}, {width}) or their diagonal ({width},) for a "
            f"weight {tuple(weight.shape)}, found {tuple(statistics.shape)}; collect them from this layer's inputs"
        )
    moments = statistics.detach().to(weight.device, torch.float32)
    check_moments(moments)
    return moments
