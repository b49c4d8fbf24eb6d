"""What the layers' inputs look like: text through the model, and second moments of what each layer sees.

- ``text``: the text: a file, tokens, or what every Python brings along
- ``moments``: E[x x^T] of chosen modules from one pass
- ``walk``: a model's forward, stopped at chosen modules
- ``groups``: moments for one group of modules after the other, in the order of the forward
- ``streamed_model``: the same through a model whose weights stay in their shards
"""
