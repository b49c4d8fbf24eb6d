"""Adapted layers in float64 numpy, written from the definitions: sums over positions, no torch, no im2col.

A branch (A, B, s) stands for the matrix s * B @ A of shape (out, in) added to the layer's weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Branch = tuple[np.ndarray, np.ndarray, float]


def array(tensor: object) -> np.ndarray:
    """A torch tensor of any float dtype and device as float64."""
    return tensor.detach().double().cpu().numpy()  # type: ignore[attr-defined]


def delta(branches: Sequence[Branch]) -> np.ndarray | float:
    """The sum of s * B @ A, entry by entry; 0 without branches."""
    return sum((s * np.einsum("or,ri->oi", B, A) for A, B, s in branches), 0.0)


def linear(x: np.ndarray, W: np.ndarray, bias: np.ndarray | None, branches: Sequence[Branch]) -> np.ndarray:
    """x (..., in) -> (..., out)."""
    y = np.einsum("...i,oi->...o", x, W + delta(branches))
    return y if bias is None else y + bias


def linear_gradients(
    x: np.ndarray, W: np.ndarray, branches: Sequence[Branch], grad: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Gradients of <y, grad>: that of x, and those of each branch's (A, B)."""
    x2, g2 = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    outer = np.einsum("no,ni->oi", g2, x2)  # the gradient of the whole weight
    factors = [(s * np.einsum("or,oi->ri", B, outer), s * np.einsum("oi,ri->or", outer, A)) for A, B, s in branches]
    return np.einsum("...o,oi->...i", grad, W + delta(branches)), factors


def embedding(ids: np.ndarray, W: np.ndarray, branches: Sequence[Branch], scale: float = 1.0) -> np.ndarray:
    """Token ids of any shape -> the columns of the (dim, vocabulary) matrix that they name."""
    return np.moveaxis((W + delta(branches))[:, ids], 0, -1) * scale


_MODES = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


def convolution(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None,
    branches: Sequence[Branch],
    *,
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
    groups: int,
    mode: str = "zeros",
) -> np.ndarray:
    """x (batch, in, *spatial), weight (out, in / groups, *kernel), branches flattened to match it."""
    kernel = weight.shape[2:]
    W = weight + np.reshape(delta(branches), weight.shape if branches else ())
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in totals]
    else:
        pads = [(0, 0)] * len(kernel) if padding == "valid" else [(int(p), int(p)) for p in padding]
    x = np.pad(x, [(0, 0), (0, 0), *pads], mode=_MODES[mode])  # type: ignore[call-overload]
    out, per_group = W.shape[:2]
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = [(n - s) // t + 1 for n, s, t in zip(x.shape[2:], spans, stride, strict=True)]
    y = np.zeros((len(x), out, *size))
    for position in np.ndindex(*size):
        corner = [p * t for p, t in zip(position, stride, strict=True)]
        window = tuple(slice(c, c + s, d) for c, s, d in zip(corner, spans, dilation, strict=True))
        for o in range(out):
            first = o // (out // groups) * per_group
            patch = x[(slice(None), slice(first, first + per_group), *window)]
            y[(slice(None), o, *position)] = (patch * W[o]).sum(axis=tuple(range(1, patch.ndim)))
    return y if bias is None else y + bias.reshape(-1, *(1,) * len(kernel))
