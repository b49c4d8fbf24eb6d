"""One adapter on disk, in PEFT's layout: strict in both directions, all or nothing.

It knows which tensors an adapter has and what files call them; how the base keeps its weight, and what a branch
computes, it must never ask.

- ``folder``: ``adapter_config.json`` and ``adapter_model.safetensors`` in a folder
- ``keys``: what the key of a tensor says
- ``slots``: which tensors of a model are an adapter's, and what its file calls each
- ``words``: tables of words that go along, where some were added
- ``parts``: factors of which each process holds a part, gathered for a file and cut from one
- ``tensors``: an adapter's tensors between a model and its file
- ``gathering``: those tensors made whole, or refused where they are pieces
- ``card``: the README.md beside it
- ``beside``: what goes beside the weights when a model saves them
- ``backbone``: the fingerprint of the quantized base that a start belongs to
- ``combined_config``: the configuration of an adapter that was computed from others
"""
