"""What ``benchmarks/gpu.py`` measures, each part in a process of its own.

- ``sizes``: how large everything is, in earnest and on ``--dry``
- ``models``: decoder layers frozen, under peft's adapters and under ours
- ``clock``: times and peak memory
- ``numerics``: whether it computes the right thing at all
- ``steps``: forward and backward
- ``decoding``: a token at a time
- ``starts``: LoftQ
- ``merges``: adapters into weights and out again
- ``checks``: the tests marked ``cuda``
- ``report``: rows as a table
"""
