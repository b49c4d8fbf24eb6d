"""How many bits each layer gets.

- ``budget``: the integer program, over measured errors and bytes
- ``allocation``: ``allocate``, for a model in memory
- ``on_disk``: the same for a model on disk, resumed where it was cut off
"""
