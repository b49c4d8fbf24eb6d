"""What the ranks do in the tests of the engines."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from engine_models import adapted, batch, of_parameter, optimizer, seed_of, train, trained
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qlora_kit import LoraModel
from qlora_kit.codecs.shards.tensors import is_sharded
from qlora_kit.distributed import Prepared, prepare

#: An engine, a base and a case.
Run = tuple[str, str, str]
#: DeepSpeed otherwise keeps parameters of up to 100,000 elements whole, all there are here.
PARTITIONED = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


def share() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()


def stepper(accelerator: Any, model: Any, stepped: Any) -> Callable[[int], float]:
    """Of a loop under accelerate: makes a step, and gives the mean of the ranks' losses."""

    def step(i: int) -> float:
        ids = batch(i, *share())
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        stepped.step()
        stepped.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return mean.item() / dist.get_world_size()

    return step


def prepared(lora: LoraModel, engine: str, **options: Any) -> Prepared:
    if engine == "zero3":
        options.setdefault("config", PARTITIONED)
    return prepare(lora, engine, optimizer=optimizer, **options)


def gradient_of(engine: str) -> Callable[[nn.Parameter], Tensor]:
    """How a trained parameter's gradient is had whole."""
    if engine.startswith("zero"):
        from deepspeed.utils import safe_get_full_grad

        return lambda parameter: safe_get_full_grad(parameter).detach()
    if engine == "fsdp2":
        return lambda parameter: of_parameter(parameter).full_tensor()
    return of_parameter


def kinds(run: Prepared) -> dict[str, Any]:
    """What shows that the engine is there."""
    parameters = dict(run.lora.named_parameters())
    own = {name: (p.to_local() if isinstance(p, DTensor) else p).numel() for name, p in parameters.items()}
    optimizer_state: Any = getattr(run.optimizer, "single_partition_of_fp32_groups", [])
    return {
        "model": type(run.model).__name__,
        "optimizer": type(run.optimizer).__name__,
        "is_ddp": isinstance(run.model, DistributedDataParallel),
        "is_fsdp": isinstance(run.lora, FSDPModule),
        "is_lora": isinstance(run.lora, LoraModel) and run.lora.__class__.__name__ == "LlamaForCausalLM",
        "whole": [name for name, p in parameters.items() if not isinstance(p, DTensor)],
        "shapes": {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        "own": own,
        "pieces": any(map(is_sharded, parameters.values())),
        "partitions": {n: p.ds_tensor.ds_numel for n, p in parameters.items() if hasattr(p, "ds_tensor")},
        "stepped": sum(flat.numel() for flat in optimizer_state),
        "trained": sum(p.numel() for p in trained(run.lora).values()),
    }


def runs(cases: Sequence[Run], folder: str) -> dict[Run, Any]:
    """For each (engine, base, case): losses, gradients, what the engine is, the adapters as they were saved, and what
    this rank has of them where that is all."""
    found: dict[Run, Any] = {}
    for engine, kind, case in cases:
        # Each rank begins with adapters of its own, and the engine gives all of them the first one's.
        lora = adapted(kind, case, seed=3 + dist.get_rank())
        run = prepared(lora, engine)
        about = kinds(run)
        torch.manual_seed(seed_of(dist.get_rank()))
        result = train(
            run.model, run.lora, run.backward, run.step, gradient_of(engine), share=share(), evaluates="eval" in case
        )
        place = Path(folder) / f"{engine} {kind} {case}"
        run.lora.save_pretrained(place)
        dist.barrier()
        copies = {} if about["pieces"] else {name: p.detach().clone() for name, p in trained(lora).items()}
        found[engine, kind, case] = (*result, about, load_file(place / "adapter_model.safetensors"), copies)
    return found
