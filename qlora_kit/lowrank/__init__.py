"""Low-rank arithmetic on plain tensors, in float32 or better whatever comes in, and autocast kept out of it.

It knows no modules: what a pair of factors stands beside is never asked.

- ``products``: the product of a factor pair, and how much of it is in a weight
- ``decomposition``: the best rank-r pair of a matrix
- ``algebra/``: several low-rank branches in, one out
"""

from .decomposition import SOLVERS, check_matrix, factor_pair, pick_solver, truncated_svd
from .products import add_product_, delta, norm, share_arrived

__all__ = [
    "SOLVERS",
    "add_product_",
    "check_matrix",
    "delta",
    "factor_pair",
    "norm",
    "pick_solver",
    "share_arrived",
    "truncated_svd",
]
