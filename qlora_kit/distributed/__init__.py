"""More than one process: what each engine needs of a model with adapters, and what it holds, gathered.

The engines are torch's, DeepSpeed's and accelerate's own; nothing here trains. It works on ``LoraModel`` from above,
and nothing below may know it.

- ``clipping``: gradients of parts and of wholes, clipped together
- ``megatron/``: adapters of Megatron's models in the files of the Hugging Face model of the same weights
- ``team``: processes that share one piece of work: values, ordered sums, and no endless waiting
- ``joining``: the team that torchrun started a process into
- ``parcels``: a value with tensors on its way from one process to another
- ``engines``: ``prepare``, one call for every engine, and what a loop needs of it
- ``sameness``: whether all processes have one model, asked before an engine assumes it
- ``chosen``: adapters chosen when an engine has taken in others
- ``ddp``: a copy of the model in each process
- ``fsdp2``: a piece of each parameter in each process, by torch
- ``zero``: the same by DeepSpeed; the optimizer's state alone, or the parameters too
- ``blocks``: the repeated parts of a model, found by structure
- ``optimizer_state``: what an optimizer keeps of a parameter, whole, whoever shares it out
- ``checkpoint``: adapters and optimizer on disk, whole, for any engine and number of processes
- ``state``: state dicts of the adapters alone, for accelerate's save_state and the like
"""

from __future__ import annotations

from .blocks import repeated_blocks
from .checkpoint import load_checkpoint, save_checkpoint
from .engines import Prepared, prepare
from .state import leave_base_out_

__all__ = ["Prepared", "leave_base_out_", "load_checkpoint", "prepare", "repeated_blocks", "save_checkpoint"]
