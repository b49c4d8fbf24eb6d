"""What the quantized model's adapters learn of the original as a whole, on text, once each layer has its start.

- ``soft_labels``: what the original foretells, of each token the likeliest words
- ``divergence``: how far a model's logits are from that, and the gradient
- ``distance``: how far a model is from its labels
- ``steps``: of AdamW on the factors
- ``surroundings``: what a caller may have switched on, set aside meanwhile
- ``training``: the adapters learn to be near
"""
