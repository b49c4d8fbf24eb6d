"""Which modules of a model get a branch, and how it gets there: plan, start, swap, all or nothing.

The engine is shared by every adapter there is. It asks a module's codec and layer family, never how it stores a weight.

- ``ties``: modules that hold one weight, and adapters that they share
- ``targets``: from what a configuration says to an exact list of modules
- ``adaptable``: what can have a branch, and why other modules of such a type can't
- ``architectures``: which modules, where the user names none
- ``hybrids``: and in layers that have none of those
- ``heads``: the modules at a model's ends, and what of them a task trains whole
- ``stacks``: matrices in one parameter, which can't have one yet: a mixture's experts
- ``read_past``: modules whose weights others' code reads instead of calling them
- ``source``: what the source of a class says of that
- ``conditions``: what settings say of the source's conditions
- ``left_out``: what a choice leaves without a branch, and how much of the model that is
- ``plan``: what will be done, as a value to print
- ``free``: whether modules are free for another adapter
- ``engine``: plan -> build -> swap, and the way back
- ``ranks``: ranks that a weight can't have, lowered to what it has
- ``adapted``: the adapters on one model as a value, which all below its face is written over
- ``uncollected``: a pause of the garbage collector, meanwhile
- ``biases``: the base's own biases in training, and as they were before
- ``megatron/``: what a configuration asks of Megatron's models
- ``buffers``: running statistics and other buffers that training moves, by adapter
"""
