"""One way to name a module: under which names a model has what a tree, a checkpoint or an adapter calls it.

- ``variants``: names of older releases, with and without the backbone's prefix
"""
