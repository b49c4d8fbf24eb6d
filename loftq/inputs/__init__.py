"""What the layers of a model are given: text through it, and second moments of what each layer sees.

Whatever the model: its own forward is run and only stopped, never imitated, and nothing in it is changed. What the
moments are for, and what becomes of a layer, must not be known here; who asks says what a layer has become.

- ``text``: the text: a file, tokens, or what every Python brings along
- ``other_rows``: of a text that a start hasn't looked at
- ``batches``: parts of it
- ``caches``: no cache is made or read while text goes through
- ``moments``: E[x x^T] of chosen modules from one pass
- ``forwards``: a module's forward exchanged for a while
- ``walk``: a model's forward, stopped at chosen modules
- ``holdings``: which memory each of many holds
- ``arguments``: of a module, so that it can be called again with the same
- ``additions``: which modules' outputs are added to a stream through their block
- ``kept_inputs``: what a block's modules are given in the original model, computed once
- ``pairs``: of one module in two models at once
- ``replaced``: the modules of a block that have become something else, and their answers
- ``one_block``: what the modules of the block are given that a walk stands at
- ``gradients``: what the model makes of errors in its modules' outputs
- ``groups``: moments for one group of modules after the other, in the order of the forward
"""
