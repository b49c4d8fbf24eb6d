"""What a configuration asks of Megatron's models before anything is planned.

- ``opening``: fused linears opened for adapters on their parts
- ``settings``: ``megatron_config`` and ``megatron_core``, held against the model
"""
