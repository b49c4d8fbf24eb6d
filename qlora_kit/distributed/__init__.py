"""More than one process: what each engine needs of a model with adapters, and what it holds, gathered.

The engines are torch's, DeepSpeed's and accelerate's own; nothing here trains. It works on ``LoraModel`` from above,
and nothing below may know it.

- ``clipping``: gradients of parts and of wholes, clipped together
- ``megatron/``: adapters of Megatron's models in the files of the Hugging Face model of the same weights
- ``team``: processes that share one piece of work: values, ordered sums, and no endless waiting
- ``joining``: the team that torchrun started a process into
- ``parcels``: a value with tensors on its way from one process to another
"""
