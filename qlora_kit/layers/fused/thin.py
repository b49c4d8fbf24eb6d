"""Products of activations with a factor of r rows, r small: what a branch adds to a layer's own product.

Adapters are float32 by default and activations half precision. Casting the activations up costs a copy of each layer's
input, several times what the products do; casting the factors down rounds away what a start measured. Neither is done:

- on accelerators a float32 factor becomes two of half precision, the nearest and what is left over (x = hi + lo, 16
  bits of a bfloat16 pair, 22 of a float16 pair), which go through the device's own half-precision product side by
  side, accumulated in float32;
- on CPUs, which have no half-precision product with a float32 output, the activations are cast for the one product,
  and the copy is let go of; what is added to an output of half precision goes in halves where the CPU has instructions
  for these, in a third of the time.

Activations are (tokens, n), factors (r, n), and the tensors of r columns between them float32, or float64 where an
operand is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.native import product_dtype


def narrow(x: Tensor, factor: Tensor) -> Tensor:
    """x F^T: (tokens, r)."""
    if not _in_halves(x):
        return x.to(dtype := _wide(x, factor)) @ factor.to(dtype).t()
    stack = _halves(factor, x.dtype)
    sides = _product(x, torch.cat(stack).t())
    return sides if len(stack) == 1 else sides[:, : len(factor)] + sides[:, len(factor) :]


def widen_(y: Tensor, u: Tensor, factor: Tensor) -> Tensor:
    """y += u F in the memory of ``y`` (tokens, n), for u (tokens, r)."""
    if not (_in_halves(y) or _rounds_as_fast(y)):
        if y.dtype == (dtype := _wide(u, factor)):
            return y.addmm_(u.to(dtype), factor.to(dtype))
        return y.add_(u.to(dtype) @ factor.to(dtype))
    left, right = _halves(u, y.dtype), _halves(factor, y.dtype)
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < 2]  # lo x lo is below the rounding
    return y.addmm_(torch.cat([left[i] for i, _ in pairs], dim=1), torch.cat([right[j] for _, j in pairs]))


def gathered(u: Tensor, x: Tensor) -> Tensor:
    """u^T x, summed over tokens: (r, n), what a factor's gradient is."""
    if not _in_halves(x):
        return u.to(dtype := _wide(u, x)).t() @ x.to(dtype)
    stack = _halves(u, x.dtype)
    sides = _product(torch.cat(stack, dim=1).t(), x)
    return sides if len(stack) == 1 else sides[: u.shape[1]] + sides[u.shape[1] :]


def casts_up(device: torch.device) -> bool:
    """Whether products on ``device`` are of activations in float32 at least, whatever they come in."""
    return device.type == "cpu"


def _in_halves(x: Tensor) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and not casts_up(x.device)


def _rounds_as_fast(y: Tensor) -> bool:
    """Whether the CPU multiplies in the half precision of ``y`` itself."""
    return y.dtype in (torch.bfloat16, torch.float16) and product_dtype(y.device.type, y.dtype) == y.dtype


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _halves(tensor: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Tensors of ``dtype`` whose sum is ``tensor``: itself, or the nearest and the rest."""
    nearest = tensor.to(dtype)
    return [nearest] if tensor.dtype == dtype else [nearest, (tensor - nearest).to(dtype)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32, of two tensors in half precision."""
    if a.device.type in ("cuda", "meta"):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float()
