"""How a low-rank branch is applied to a module's function: one family for each kind of function.

A family knows nothing of storage: it asks the base module's codec. One is found by the module's type.

- ``base``: ``AdapterLayer``, what every family shares
- ``registry``: from a module's type to its family
- ``merged``: what is merged into a base weight, and the way back
- ``as_merged``: the weight as it will be after merging, computed with before
- ``weight_in_effect``: what a layer answers when its weight is read
- ``rescaled``: weights that a model rescales for inference, at the size that they are stored in
- ``linear``: y = W x + b, however W is stored
- ``fused/``: the same as one function, which keeps and passes over the least
- ``conv1d``: transformers' ``Conv1D``, which is linear too
- ``conv``: convolutions in one, two and three dimensions
- ``embedding``: tables
- ``sharded/``: layers of which each process of a group holds a part
- ``saved``: whole modules trained beside the factors (``modules_to_save``)
- ``rows``: which of a layer's inputs belong to which row of a batch, where each has an adapter of its own
- ``row_choice``: how layers learn of that
- ``row_products``: what layers compute then
- ``by_hand``: what is done to a single layer: chosen, switched off, rescaled, merged
- ``named``: containers of what each adapter has, under any name
"""

from ..codecs import on_demand as codecs_on_demand
from .as_merged import Rounding
from .base import AdapterLayer
from .conv import ConvAdapter
from .embedding import EmbeddingAdapter
from .fused.choice import chosen_branch, set_branch
from .linear import LinearAdapter
from .named import RESERVED
from .registry import find_layer_family, layer_family_for, on_demand, register_layer
from .saved import ModulesToSave, parts_to_save, saved_module
from .sharded import dtensor
from .sharded.embedding import ShardedEmbeddingAdapter
from .sharded.linear import ShardedLinearAdapter
from .sharded.sharding import Sharding, register_sharding, sharding_of

on_demand["transformers"] = f"{__name__}.conv1d"
for table in (on_demand, codecs_on_demand):  # what they store and what they compute is told by one table of types
    table.update(megatron=f"{__name__}.sharded.megatron", transformer_engine=f"{__name__}.sharded.megatron")

__all__ = [
    "AdapterLayer",
    "ConvAdapter",
    "EmbeddingAdapter",
    "LinearAdapter",
    "ModulesToSave",
    "RESERVED",
    "Rounding",
    "ShardedEmbeddingAdapter",
    "ShardedLinearAdapter",
    "Sharding",
    "chosen_branch",
    "dtensor",
    "find_layer_family",
    "layer_family_for",
    "parts_to_save",
    "register_layer",
    "register_sharding",
    "saved_module",
    "set_branch",
    "sharding_of",
]
