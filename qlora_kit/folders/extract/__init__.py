"""The best adapter for the difference of two checkpoints, streamed from their shards.

- ``run``: ``extract_folders``
- ``contents``: what goes into the adapter: factors, whole modules, biases, and the configuration that fits them
- ``report``: what was taken over, and what was left
"""
