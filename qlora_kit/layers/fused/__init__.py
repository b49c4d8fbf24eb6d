"""Linear layers and their branches as one function: the least kept, the fewest passes over activations.

- ``choice``: the plain form of a layer's branch, or the fused one
- ``linear``: a linear layer and its branches as one function
- ``blocks``: a feed-forward block whose activations are computed again
- ``settings``: what such a block's forward may depend on beside its children
- ``branch``: one adapter's part of a layer, forward and backward
- ``mask``: dropout that is drawn again instead of being kept
- ``thin``: products of activations with a factor of few rows
"""
