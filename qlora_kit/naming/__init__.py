"""One way to name a module: under which names a model has what a tree, a checkpoint or an adapter calls it.

All that chooses, saves, loads or merges modules asks here. Nothing here knows what a module computes or stores.

- ``tree``: a live model by canonical paths, wrappers stripped, shared modules listed
- ``expressions``: regular expressions of unknown origin, which are given a time to decide
- ``suffixes``: names that mean the last components of a path, asked of many paths at once
- ``variants``: names of older releases, with and without the backbone's prefix
"""

from .expressions import Expression
from .suffixes import Patterns, Suffixes, ends_with, pattern_value
from .tree import Closed, StandIn, Tree, base_of, canonical, chain, every_module, module_at, slot, unwrapped
from .variants import Variants

__all__ = [
    "Closed",
    "Expression",
    "Patterns",
    "StandIn",
    "Suffixes",
    "Tree",
    "Variants",
    "base_of",
    "canonical",
    "chain",
    "ends_with",
    "every_module",
    "module_at",
    "pattern_value",
    "slot",
    "unwrapped",
]
