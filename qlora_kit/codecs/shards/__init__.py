"""Weights and factors of which this process holds a part, and others the rest.

- ``tensors``: told apart, gathered whole, filled, whichever engine keeps them so
- ``view``: the codec of a weight that its layer computes with a part of
"""
