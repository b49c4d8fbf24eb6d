"""Which modules of a model get a branch, and how it gets there: plan, start, swap, all or nothing.

The engine is shared by every adapter there is. It asks a module's codec and layer family, never how it stores a weight.

- ``targets``: from what a configuration says to an exact list of modules
- ``architectures``: which modules, where the user names none
- ``read_past``: modules whose weights others' code reads instead of calling them
- ``source``: what the source of a class says of that
- ``conditions``: what settings say of the source's conditions
- ``engine``: plan -> build -> swap, and the way back
- ``ranks``: ranks that a weight can't have, lowered to what it has
- ``adapted``: the adapters on one model as a value, which all below its face is written over
- ``biases``: the base's own biases in training, and as they were before
"""
