"""Trellis types: rows rotated to look normal, and codes whose values depend on the codes before them too.

At as many bits that leaves far less squared error than a table for single values can: of a normal distribution 0.079
at 2 bits, where the best table leaves 0.118 and no code can leave less than 0.0625 (``benchmarks/RESULTS.md``).

- ``rotation``: the change of basis
- ``tables``: what codes stand for, by the numbers of ``kernels.window``
- ``search``: the best codes for given values
- ``fit``: a matrix's codes and scales
"""
