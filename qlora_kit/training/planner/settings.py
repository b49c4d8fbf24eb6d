"""What a training run is planned with."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ...config.checks import check_bool, check_choice, check_int, check_names, failure
from ...config.loftq import DEFAULT_TYPES
from ...config.merge_aware import MergeAware
from ...merging.task import storage_name
from .optimizers import OPTIMIZERS, named

#: Of the weights that adapters stand on; at 16 they stay as they are.
BITS = (16, 8, 4, 3, 2)
DTYPES = ("bfloat16", "float16", "float32")
#: Ways to share a run out among GPUs, see ``world``.
ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "tp")


@dataclass(frozen=True)
class Settings:
    """A training run.

    Attributes:
        bits: of the linear layers' weights, as ``quantize_`` stores them; 16 leaves them dense, in ``dtype``.
        quant_type, blocksize, double_quant: as in ``quantize_``; a type says the bits.
        rank, targets, dropout: of the adapters, as in ``LoraConfig``.
        seq, batch: tokens a row, and rows.
        accumulation: batches to a step of the optimizer.
        merge_aware: the storage that adapters are trained to be merged into, as in ``LoraConfig``: "nf4", "same".
        dtype: of what isn't quantized, and of activations.
        adapter_dtype: of the adapters and their gradients.
        optimizer: of ``optimizers.OPTIMIZERS``, or as ``training.optimizers`` has it: "paged_adamw_8bit".
        checkpointing: recompute the layers' activations in the backward pass.
        chunked_loss: compute the loss a few tokens at a time, so that the logits of all are never there.
        world_size: GPUs that share the run; the plan is of one of them.
        engine: of ``ENGINES``, by which they do. Each works at a batch of its own, but for "tp", where all work at one.
        attention: "sdpa", torch's fused kernels, or "eager", which keeps a matrix of tokens by tokens for each head.

    Raises:
        ConfigError: a field has a value that can't work.
    """

    bits: int = 4
    rank: int = 16
    seq: int = 2048
    batch: int = 1
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = True
    chunked_loss: bool = False
    attention: str = "sdpa"
    accumulation: int = 1
    quant_type: str | None = None
    blocksize: int | None = 64
    double_quant: bool = False
    world_size: int = 1
    engine: str = "ddp"
    merge_aware: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.quant_type is not None and str(self.quant_type)[-1:].isdigit():
            object.__setattr__(self, "bits", int(self.quant_type[-1]))
        if self.bits not in BITS:
            raise failure("bits", f"one of {list(BITS)}", self.bits, "pass bits=4")
        for name in ("rank", "seq", "batch", "accumulation", "world_size"):
            check_int(name, getattr(self, name), 1, f"pass {name}={getattr(type(self), name)}")
        for name in ("dtype", "adapter_dtype"):
            object.__setattr__(self, name, storage_name(getattr(self, name)))
        check_choice("dtype", self.dtype, DTYPES, "pass dtype='bfloat16'")
        check_choice("adapter_dtype", self.adapter_dtype, DTYPES, "pass adapter_dtype='float32'")
        if isinstance(self.optimizer, str):
            object.__setattr__(self, "optimizer", named(self.optimizer))
        check_choice("optimizer", self.optimizer, tuple(OPTIMIZERS), "pass optimizer='adamw'")
        check_choice("engine", self.engine, ENGINES, "pass engine='fsdp2'")
        check_choice("attention", self.attention, ("sdpa", "eager"), "pass attention='sdpa'")
        for name in ("checkpointing", "chunked_loss", "double_quant"):
            check_bool(name, getattr(self, name))
        if self.merge_aware is not None:
            self._check_merge_aware(self.merge_aware)
        names = check_names("targets", self.targets, regex=True) if self.targets != "all-linear" else self.targets
        object.__setattr__(self, "targets", names if isinstance(names, str) else tuple(names or ()))

    def _check_merge_aware(self, value: Any) -> None:
        object.__setattr__(self, "merge_aware", MergeAware.of({"into": value}).into)
        if self.dropout:
            raise failure("dropout", "0 with merge_aware", self.dropout, "pass dropout=0.0")
        if self.world_size > 1 and self.engine in ("zero3", "tp"):
            fix = "pass engine='fsdp2', 'zero2' or 'ddp'"
            raise failure("engine", "one that leaves a GPU whole weights to round (merge_aware)", self.engine, fix)

    def but(self, **others: Any) -> Settings:
        """The same with ``others`` in the place of its own."""
        return replace(self, **others)

    @property
    def storage(self) -> str:
        """The type that the linear layers are stored in."""
        return self.dtype if self.bits == 16 else self.quant_type or DEFAULT_TYPES[self.bits]

    @property
    def compute_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "storage": self.storage}

    def __str__(self) -> str:
        targets = self.targets if isinstance(self.targets, str) else ", ".join(self.targets)
        extras = [f"{self.attention} attention", self.optimizer]
        extras += ["checkpointing"] * self.checkpointing + ["chunked loss"] * self.chunked_loss
        extras += [f"trained for a merge into {self.merge_aware}"] * (self.merge_aware is not None)
        extras += [f"on {self.world_size} GPUs by {self.engine}"] * (self.world_size > 1)
        return (
            f"{self.bits} bits ({self.storage}), rank {self.rank} on {targets}, {self.batch} x {self.seq:,} tokens in "
            f"{self.dtype}: {', '.join(extras)}"
        )
