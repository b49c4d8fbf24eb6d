"""More than one process: what each engine needs of a model with adapters, and what it holds, gathered.

The engines are torch's, DeepSpeed's and accelerate's own; nothing here trains. It works on ``LoraModel`` from above,
and nothing below may know it.

- ``clipping``: gradients of parts and of wholes, clipped together
- ``megatron/``: adapters of Megatron's models in the files of the Hugging Face model of the same weights
"""
