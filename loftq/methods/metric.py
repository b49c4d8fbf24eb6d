"""How a layer's error is measured: by its weight alone, or by what it does to the layer's inputs.

For inputs x with second moments R = E[x x^T], an error E (out, in) of the weight costs E ||E x||^2 = tr(E R E^T) =
||E F||^2 in the Frobenius norm, for any F with F F^T = R. So a problem that is weighted by the inputs is the plain
one for E F, and F^-1 leads back. No square root of a matrix is needed: F is triangular.

Which triangle. Rounding with error feedback (``rounding``) goes through the columns in some order and wants
R = U D U^T with U unit upper triangular in that order. Reversing rows and columns turns the usual lower Cholesky
factor into an upper one, and columns are taken by falling mean square, so that the inputs that matter most are
rounded first and the others make up for them. The same factor then serves the low-rank correction.

Damping. R of few or dependent inputs is singular, and directions that the calibration text never showed are not
free: R + damping * mean(diag R) * I is used in R's place, with more damping where that is still not positive in
float64, up to what rounding R's entries to bfloat16 can have caused. What needs more never was E[x x^T].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qlora_kit.codecs.trellis.rotation import rotate
from qlora_kit.errors import ConfigError
from qlora_kit.lowrank import norm
from qlora_kit.lowrank.products import SAFE_NORMS

from .checks import check_moments

# The share of the mean square that is added to every input's own: what GPTQ and CLoQ take.
DAMPING = 0.01
# Less isn't told from none in float32, and an input that is always zero has to get some.
LEAST_DAMPING = 1e-7
# Rounding its entries to bfloat16 moves no eigenvalue of R by more than half of this times R's Frobenius norm.
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Metric:
    """F with F F^T = R, damped.

    Attributes:
        factor: None for the plain norm, float32 (in,) for a diagonal F, or (in, in) upper triangular.
        order: the columns of the weight in the order of the triangle's, where it is one.
    """

    factor: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, statistics: Tensor | None, *, diagonal: bool = False, damping: float = DAMPING) -> Metric:
        """The metric of second moments (in, in) or their diagonal (in,); of the plain norm for None or zeros.

        Args:
            diagonal: use no more than the diagonal.
            damping: share of the mean of R's diagonal that is added to it, ``LEAST_DAMPING`` at least.

        Raises:
            ConfigError: the moments aren't finite or aren't positive semidefinite.
        """
        if statistics is None:
            return cls()
        moments = statistics.double()
        squares = moments if moments.dim() == 1 else moments.diagonal()
        check_moments(moments)
        mean = squares.mean()
        if mean == 0:
            return cls()
        shift = max(damping, LEAST_DAMPING) * float(mean)
        if moments.dim() == 1 or diagonal:
            return cls((squares + shift).sqrt().float())
        order = torch.argsort(squares, descending=True, stable=True)
        # The last column first: the Cholesky factor of the reversed matrix, reversed, is upper triangular.
        backward = order.flip(0)
        matrix = moments[backward][:, backward]
        matrix = (matrix + matrix.T) / 2
        most = float(_ROUNDING * matrix.norm())
        while True:
            damped = matrix.clone()
            damped.diagonal().add_(shift)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                return cls(lower.flip(0, 1).float().contiguous(), order)
            if shift >= most:
                raise ConfigError(
                    "statistics: expected second moments E[x x^T], which are positive semidefinite, found a matrix "
                    f"that damping of {shift / float(mean):.3g} times its mean square doesn't make so; collect them "
                    "from inputs"
                )
            shift = min(10 * shift, most)

    @cached_property
    def rotated_factor(self) -> Tensor:
        """The upper triangular F, float32 (in, in), of the rotated inputs in their own order; not of the plain norm."""
        assert self.factor is not None
        root = torch.diag(self.factor) if self.order is None else torch.empty_like(self.factor)
        if self.order is not None:
            root[self.order] = self.factor
        root = rotate(root.double().T)  # F^T, so that the moments are its Gram matrix
        # QR of what is read backwards gives the triangle without squaring what is lost in the moments.
        triangle = torch.linalg.qr(root.flip(1), mode="r").R
        triangle = triangle * torch.where(triangle.diagonal() < 0, -1.0, 1.0)[:, None]
        return triangle.T.flip(0, 1).float()

    @property
    def plain(self) -> bool:
        return self.factor is None

    def weigh(self, matrix: Tensor) -> Tensor:
        """``matrix`` (rows, in) times F; ``matrix`` itself for the plain norm."""
        if self.factor is None:
            return matrix
        if self.order is None:
            return matrix * self.factor
        return matrix[:, self.order] @ self.factor

    def unweigh(self, matrix: Tensor) -> Tensor:
        """``matrix`` (rows, in) times F^-1."""
        if self.factor is None:
            return matrix
        if self.order is None:
            return matrix / self.factor
        solved = torch.linalg.solve_triangular(self.factor.double(), matrix.double(), upper=True, left=False)
        result = torch.empty_like(matrix)
        result[:, self.order] = solved.to(matrix.dtype)
        return result


def output_norm(matrix: Tensor, statistics: Tensor) -> float:
    """sqrt(E ||matrix @ x||^2) = sqrt(tr(matrix R matrix^T)) for inputs of second moments R, or its diagonal."""
    if statistics.dim() == 1:
        return norm(matrix * statistics.sqrt())
    found = float(((matrix @ statistics) * matrix).sum(dtype=torch.float64).clamp_min(0).sqrt())
    if not SAFE_NORMS[0] < found < SAFE_NORMS[1]:
        matrix = matrix.double()
        found = float(((matrix @ statistics.double()) * matrix).sum().clamp_min(0).sqrt())
    return found
