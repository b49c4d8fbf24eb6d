"""One call for every engine.

The engines differ in what comes first: FSDP2 makes other parameters, so the optimizer comes after it; DeepSpeed takes
the optimizer in. So ``prepare`` is given how to make one. It returns the few things that a loop needs:

    run = prepare(lora, "fsdp2", optimizer=lambda trained: torch.optim.AdamW(trained, lr=2e-4))
    for batch in loader:
        loss = run.model(**batch).loss
        run.backward(loss)
        run.step()
    run.lora.save_pretrained("adapter")  # on every rank

An engine is a function registered under a name; the ones here are thin, and what each does is said in its module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..codecs.shards.tensors import is_sharded
from ..errors import AdapterError, ConfigError, closest
from ..layers.sharded.sharded import ShardedLayer
from ..model import LoraModel
from . import ddp, fsdp2, zero
from .sameness import check_same

MakesOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` returns.

    Attributes:
        engine: its name.
        model: what is called: DDP's wrapper, the sharded ``LoraModel`` itself, or a ``DeepSpeedEngine``.
        lora: the ``LoraModel`` within.
        optimizer: None where none was asked for.
    """

    engine: str
    model: Any
    lora: LoraModel
    optimizer: Optimizer | None

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss``, averaged over the ranks."""
        if self.of_deepspeed:
            self.model.backward(loss)
        else:
            loss.backward()

    def step(self) -> None:
        """One step of the optimizer, and gradients set to nothing."""
        if self.of_deepspeed:
            self.model.step()
        elif self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def of_deepspeed(self) -> bool:
        return self.engine.startswith("zero")


def prepare(lora: LoraModel, engine: str, *, optimizer: MakesOptimizer | None = None, **options: Any) -> Prepared:
    """Make ``lora`` ready to be trained by the processes of the default group, each of which calls this.

    Args:
        lora: with all its adapters on, those that train chosen; on this process's device, except for "fsdp2", which
            moves what it shards.
        engine: "ddp", "fsdp2", "zero2" or "zero3".
        optimizer: makes one of the parameters that train; DeepSpeed's engines need it.
        options: of ``DistributedDataParallel``, ``fully_shard`` (and ``blocks``, the parts to gather at a time), or
            ``deepspeed.initialize`` (``config``).

    Raises:
        AdapterError: no process group, a model that isn't the same in every process or is in parts already, or one that
            the engine would train wrongly; it says what to change. The model is as it was.
        ConfigError: another engine.
        ImportError: DeepSpeed is wanted and isn't installed.
    """
    if engine not in _ENGINES:
        meant = "".join(f"; did you mean {near!r}?" for near in closest(str(engine), list(_ENGINES), 1))
        raise ConfigError(f"engine: expected one of {list(_ENGINES)}, found {engine!r}{meant}")
    if not isinstance(lora, LoraModel):
        raise AdapterError(f"prepare: expected what apply_lora returns, found {type(lora).__name__}; call it first")
    if not dist.is_initialized():
        raise AdapterError(
            "prepare: expected a process group, found none; start the script with torchrun and call "
            "torch.distributed.init_process_group() (or deepspeed.init_distributed()) before"
        )
    if not any(p.requires_grad for p in lora.parameters()):
        raise AdapterError("prepare: expected parameters that train, found none; call set_adapter(name) first")
    _check_whole(lora)
    return _ENGINES[engine](lora, optimizer, options)


def _check_whole(lora: LoraModel) -> None:
    parts = [f"{path}.base_layer" for path, layer in lora.adapter_layers().items() if isinstance(layer, ShardedLayer)]
    parts += [name for name, parameter in lora.named_parameters() if is_sharded(parameter)]
    if parts:
        raise AdapterError(
            f"{parts[0]}: expected a model that each process has whole, found one that is in parts already; train it "
            "as it is, with an optimizer made of its parameters now, or load it again for prepare"
        )


def _trained(lora: LoraModel) -> list[nn.Parameter]:
    return [parameter for parameter in lora.parameters() if parameter.requires_grad]


def _ddp(lora: LoraModel, make: MakesOptimizer | None, options: dict[str, Any]) -> Prepared:
    check_same(lora)
    model = ddp.replicate(lora, **options)
    return Prepared("ddp", model, lora, make and make(_trained(lora)))


def _fsdp2(lora: LoraModel, make: MakesOptimizer | None, options: dict[str, Any]) -> Prepared:
    fsdp2.shard_(lora, **options)
    return Prepared("fsdp2", lora, lora, make and make(_trained(lora)))


def _zero(stage: int) -> Callable[[LoraModel, MakesOptimizer | None, dict[str, Any]], Prepared]:
    def engine(lora: LoraModel, make: MakesOptimizer | None, options: dict[str, Any]) -> Prepared:
        if make is None:
            raise ConfigError(f"engine 'zero{stage}': expected optimizer=..., which DeepSpeed shares out, found none")
        check_same(lora)
        model = zero.partition(lora, stage, make(_trained(lora)), **options)
        return Prepared(f"zero{stage}", model, lora, model.optimizer)

    return engine


_ENGINES: dict[str, Callable[[LoraModel, MakesOptimizer | None, dict[str, Any]], Prepared]] = {
    "ddp": _ddp,
    "fsdp2": _fsdp2,
    "zero2": _zero(2),
    "zero3": _zero(3),
}
