"""One adapter's part of a linear layer, forward and backward, on matrices of (tokens, features)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .mask import Mask
from .thin import gathered, narrow, widen_


@dataclass(frozen=True, eq=False)
class Branch:
    """s (M . x) A^T B^T: A (r, in), B (out, r) of any floating dtype, the scaling s, and M, what dropout leaves of the
    input (None: all of it)."""

    A: Tensor
    B: Tensor
    s: float
    mask: Mask | None = None

    @property
    def scale(self) -> float:
        """s, and what kept inputs are multiplied by."""
        return self.s if self.mask is None else self.s * self.mask.scale

    def cheaper_in_the_weight(self, tokens: int, dtype: torch.dtype) -> bool:
        """Whether B A is better added to a weight in ``dtype``, once, than to the products of so many tokens."""
        out_features, in_features = len(self.B), self.A.shape[1]
        exact = dtype in (torch.float32, torch.float64)  # half precision would round the sum
        return self.mask is None and exact and tokens * (in_features + out_features) > in_features * out_features

    def narrowed(self, x: Tensor) -> Tensor:
        """The scaled product of rank r of ``x`` (tokens, in): (tokens, r)."""
        kept = self.kept(x)
        return self._narrowed(x if kept is None else x * kept)

    def _narrowed(self, masked: Tensor) -> Tensor:
        return narrow(masked, self.A).mul_(self.scale)

    def add_(self, y: Tensor, narrowed: Tensor) -> None:
        """Add the branch to ``y`` (tokens, out)."""
        widen_(y, narrowed, self.B.t())

    def kept(self, like: Tensor) -> Tensor | None:
        """The mask over ``like`` (tokens, in)."""
        return None if self.mask is None else self.mask.kept(like)

    def backward(
        self,
        grad: Tensor,
        *,
        x: Tensor | None,
        narrowed: Tensor | None,
        grad_x: Tensor | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of A and B where they are needed; the input's is added to ``grad_x``.

        Args:
            grad: of the output, (tokens, out).
            x: (tokens, in), where ``narrowed``, what the forward added, is to be made from it.
            grad_x: (tokens, in), or None.
        """
        kept = None if x is None and grad_x is None else self.kept(grad_x if x is None else x)  # type: ignore[arg-type]
        if x is not None and kept is not None:
            x = x * kept
        grad_A = grad_B = None
        if needs[1]:
            if x is not None:
                narrowed = self._narrowed(x)
            assert narrowed is not None
            grad_B = gathered(narrowed, grad).t().to(self.B.dtype)
        if needs[0] or grad_x is not None:
            narrowed_grad = narrow(grad, self.B.t()).mul_(self.scale)
            if needs[0]:
                assert x is not None
                grad_A = gathered(narrowed_grad, x).to(self.A.dtype)
            if grad_x is not None:
                _add_(grad_x, narrowed_grad, self.A, kept)
        return grad_A, grad_B


def _add_(grad_x: Tensor, narrowed_grad: Tensor, A: Tensor, kept: Tensor | None) -> None:
    if kept is None:
        widen_(grad_x, narrowed_grad, A)
    else:
        grad_x.addcmul_(widen_(torch.zeros_like(grad_x), narrowed_grad, A), kept)
