"""The algebra of adapters: several low-rank branches of one module in, one out; pure tensors, no modules, no files.

A model in memory and folders on the disk go through the same functions, so they give the same bits. It must never know
which of the two it works for, nor what the branches stand beside.

- ``combination``: ``combine``, the way to every type, for one module
- ``registry``: the types by name, and the recipe of a combination
- ``records``: what goes in and what comes out
- ``walk``: every module of an adapter, and the report
- ``exact``: sums of low-rank terms: stack, QR, SVD of a small core
- ``pruning``: types that work entry by entry: pruning, sign election, means
- ``spectra``: types that work on a shared basis of singular vectors
"""

from .combination import combine
from .exact import core_svd, distance, exact_rank, weighted_stack
from .records import Branch, Combined, one_rank
from .registry import Recipe, combination_types, register_combination
from .walk import CombineReport, LayerCombination, Weights, combine_layers

__all__ = [
    "Branch",
    "Combined",
    "CombineReport",
    "LayerCombination",
    "Recipe",
    "Weights",
    "combination_types",
    "combine",
    "combine_layers",
    "core_svd",
    "distance",
    "exact_rank",
    "one_rank",
    "register_combination",
    "weighted_stack",
]
