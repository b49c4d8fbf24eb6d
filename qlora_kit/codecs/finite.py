"""Is every value of a tensor finite? Asked of every weight that is merged, so it should cost next to nothing.

NaN and infinity survive a sum, so a finite sum means that all values are, and on a CPU costs a twentieth of looking at
each. A sum of finite values may overflow by itself; only then is every value looked at.
"""

from __future__ import annotations

import math

from torch import Tensor

# Values that are looked at in one piece.
_PIECE = 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Whether ``tensor``, of any shape and dtype, holds neither NaN nor infinity."""
    if tensor.is_floating_point() and tensor.element_size() == 1:  # torch sums no float8
        return all(bool(piece.float().isfinite().all()) for piece in tensor.reshape(-1).split(_PIECE))
    if not tensor.is_floating_point() or math.isfinite(tensor.sum().item()):
        return True
    return all(bool(piece.isfinite().all()) for piece in tensor.reshape(-1).split(_PIECE))
