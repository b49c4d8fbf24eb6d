"""The algebra of adapters: several low-rank branches of one module in, one out; pure tensors, no modules, no files."""

from .combine import combine
from .exact import core_svd, distance, exact_rank, weighted_stack
from .records import Branch, Combined
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
    "register_combination",
    "weighted_stack",
]
