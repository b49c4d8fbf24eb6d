"""Merging from disk to disk: the bits that ``merge`` and ``save_pretrained`` give, a tensor at a time.

- ``run``: ``merge_folders``, the whole of it, resumed where it was cut off
- ``base_check``: is a stored model the base that an adapter was started on?
- ``trained_config``: what an adapter's tensors say of the config it was trained with
- ``changes``: what adapters change in a stored model, by name
- ``ties``: what stays one tensor under a merge, and what becomes several
- ``plan``: from model and changes to what is read, and what is written in its place
- ``parameter``: one parameter: read, changed, stored
- ``settings``: config.json of the result
- ``verify``: is what was written what should have been?
"""
