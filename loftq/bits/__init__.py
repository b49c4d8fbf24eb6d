"""How many bits each layer gets, and which rank, where the whole has to fit a budget.

Every choice of every layer is measured, and an integer program takes the best sum; the outcome is a configuration as a
user would write it. The program must know numbers only, neither layers nor methods; and a start need not know that a
budget chose its bits.

- ``budget``: the integer program, over measured errors and bytes
- ``allocation``: the measuring and choosing; ``allocate``, for a model in memory
"""
