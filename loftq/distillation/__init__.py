"""What the quantized model's adapters learn of the original as a whole, on text, once each layer has its start.

- ``soft_labels``: what the original foretells, of each token the likeliest words
- ``divergence``: how far a model's logits are from that, and the gradient
- ``steps``: of AdamW on the factors
- ``training``: the adapters learn to be near
"""
