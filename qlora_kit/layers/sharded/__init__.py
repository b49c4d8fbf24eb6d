"""Layers of which each process of a group holds a part: what is sharded, how, and a branch beside it.

- ``sharding``: ``Sharding``, the small value that says how a layer is shared out, and from a module's type to it
- ``collectives``: what ranks tell each other, as functions with gradients
- ``thin``: a branch over a sharded layer, whose only traffic is of rank r
- ``parts``: factors and weights cut to a rank's part, and gathered
- ``whole``: a module as one process would hold it, and quantized weights cut to a part
- ``moving``: parts in storages that can't be DTensors, which move activations by themselves
- ``together``: what all ranks do to their parts, or none
- ``sharded``: what the families share
- ``linear``: linear layers, sharded by columns or rows, whatever library did it and however the weight is stored
- ``embedding``: tables, by words or by width
- ``dtensor``: the layers that torch's ``parallelize_module`` and transformers' ``tp_plan`` make
- ``megatron/``: Megatron's and TransformerEngine's, whose types are known by their names
"""
