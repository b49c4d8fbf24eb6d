"""Models on disk: folders of safetensors that may be larger than memory, read, written and resumed.

Everything here goes a tensor at a time and knows nothing of adapters or of what its callers compute.

Files and runs:

- ``files``: a write is whole or absent
- ``checksums``: a checksum of each tensor that a run writes
- ``shards``: shards read a tensor at a time
- ``growing_file``: one shard written a tensor at a time
- ``growing_model``: a model's shards while they grow, and how they come to their places
- ``journal``: the record of a run that can be cut off at any point
- ``records``: what its lines may hold
- ``pipeline``: the next tensor is read while one is worked on
- ``large_pages``: copies in memory that is let go of as a whole
- ``spill``: tensors set aside on the disk while a model is changed in place

What the tensors are:

- ``model_folder``: a folder's model on the meta device, its other files, what tells it from a changed one
- ``stored_names``: which of a checkpoint's tensors are which of a model's
- ``stored_model``: what is stored of each parameter, and the modules themselves
- ``pair``: two checkpoints of one model side by side
- ``quantized_tensors``: a quantized module from its tensors
- ``originals``: the 16-bit weight that a quantized module was made from
"""
