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
float64 (which only rounding errors of R can cause).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora_kit.errors import ConfigError

# The share of the mean square that is added to every input's own: what GPTQ and CLoQ take.
DAMPING = 0.01
_MOST_ATTEMPTS = 8


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
            damping: share of the mean of R's diagonal that is added to it.

        Raises:
            ConfigError: the moments aren't positive semidefinite.
        """
        if statistics is None:
            return cls()
        moments = statistics.double()
        squares = moments if moments.dim() == 1 else moments.diagonal()
        mean = squares.mean()
        if not mean > 0:
            return cls()
        if moments.dim() == 1 or diagonal:
            return cls((squares + damping * mean).sqrt().float())
        order = torch.argsort(squares, descending=True, stable=True)
        # The last column first: the Cholesky factor of the reversed matrix, reversed, is upper triangular.
        backward = order.flip(0)
        matrix = moments[backward][:, backward]
        matrix = (matrix + matrix.T) / 2
        shift = damping * mean
        for _ in range(_MOST_ATTEMPTS):
            lower, failed = torch.linalg.cholesky_ex(matrix + shift * torch.eye(len(order), device=matrix.device))
            if not failed:
                return cls(lower.flip(0, 1).float().contiguous(), order)
            shift = max(10 * shift, 1e-7 * mean)
        raise ConfigError(
            "statistics: expected second moments E[x x^T], which are positive semidefinite, found a matrix that "
            f"damping of {float(shift / mean):.3g} times its mean square doesn't make so; collect them from inputs"
        )

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
