"""Dequantize, merge, requantize in memory, and the account of what was lost.

Written once over the codecs' ``read`` and ``write_``; a merge happens as a whole or not at all.
It works on ``injection.adapted.Adapted`` and must never know the wrapper that users hold, nor a storage format by name.

- ``in_memory``: ``merge``, from the first check to the report
- ``in_place``: merges that stay undoable, and adapters switched off and on
- ``task``: what it is asked for, checked before anything is written
- ``aware``: adapters that are trained for a merge: what they round, and which merge is theirs
- ``layer``: one layer at a time
- ``rest_of_model``: what changes beside the adapted layers: trained copies, dtypes, what the config says
- ``parts``: adapters on parts of fused linears, as adapters on these
- ``ties``: tied weights, one again or said to be two
- ``unsaved_buffers``: those that follow the model's dtype
- ``requantize``: from an ideal weight back to few bits
- ``base_choice``: dequantized or original weights to add to, measured
- ``residual``: the small adapter that stays and holds what rounding lost
- ``fidelity``: what was kept of one layer
- ``report``: ``MergeReport``, what was kept of the model
- ``fidelity_plot``: the same as a picture
- ``agreement``: how far the merged model's output is from the adapted one's
- ``advice``: what to say when the delta would be lost
"""
