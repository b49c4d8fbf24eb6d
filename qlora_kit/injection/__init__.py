"""Which modules of a model get a branch, and how it gets there: plan, start, swap, all or nothing.

The engine is shared by every adapter there is. It asks a module's codec and layer family, never how it stores a weight.

- ``targets``: from what a configuration says to an exact list of modules
- ``architectures``: which modules, where the user names none
- ``engine``: plan -> build -> swap, and the way back
- ``adapted``: the adapters on one model as a value, which all below its face is written over
- ``biases``: the base's own biases in training, and as they were before
- ``buffers``: running statistics and other buffers that training moves, by adapter
"""
