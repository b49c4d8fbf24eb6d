"""What the ranks do in the tests of accelerate and transformers' Trainer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("ACCELERATE_USE_CPU", "true")

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from engine_models import Rows, adapted, optimizer, trained
from jobs_of_engines import stepper
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from qlora_kit import LoraModel
from qlora_kit.distributed import leave_base_out_


def accelerator(engine: str, **plugin: Any) -> Accelerator:
    AcceleratorState._reset_state(True)
    made = Accelerator(cpu=True)
    if engine == "fsdp2":
        # accelerate starts FSDP on accelerators alone, and ignores the plugin here. What it does there is done here
        # by its own functions, once its state says so.
        made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            **plugin,
        )
        for state in (made.state, PartialState()):  # each of which the other is set from
            state.distributed_type = DistributedType.FSDP
    return made


def loop(engine: str, kinds: list[str], folder: str) -> dict[str, Any]:
    """A loop of one's own: two steps, a state, two more, and these again from the state."""
    found: dict[str, Any] = {}
    for kind in kinds:
        place = Path(folder) / engine / kind
        whole = {"ignored_modules": r".*base_layer"} if kind == "int8" else {}  # as our message says
        accelerated = accelerator(engine, **whole)
        lora = leave_base_out_(adapted(kind, "copies", seed=3))
        model, stepped = accelerated.prepare(lora, optimizer(list(trained(lora).values())))

        step = stepper(accelerated, model, stepped)
        first = [step(0), step(1)]
        accelerated.save_state(str(place / "state"))
        dist.barrier()
        then = [step(2), step(3)]
        accelerated.load_state(str(place / "state"))
        again = [step(2), step(3)]
        unwrapped = accelerated.unwrap_model(model)
        unwrapped.save_pretrained(place / "adapter")
        dist.barrier()
        own = accelerated.get_state_dict(model)
        if accelerated.is_main_process:  # as accelerate's own examples save
            unwrapped.save_pretrained(place / "gathered", state_dict=own, is_main_process=True)
        dist.barrier()
        found[kind] = {
            "losses": first + then,
            "again": again,
            "unwrapped": unwrapped is lora and type(unwrapped).__mro__.count(LoraModel) == 1,
            "ddp": isinstance(model, DistributedDataParallel),
            "fsdp": isinstance(model, FSDPModule),
            "dtensors": sum(isinstance(p, DTensor) for p in lora.parameters()),
            "keys": keys_of(place / "state"),
            "own": list(trained(lora)),
        }
    return found


def keys_of(folder: Path) -> list[str]:
    """Names of the tensors of the model in what accelerate has saved."""
    sharded = folder / "pytorch_model_fsdp_0"
    if sharded.exists():
        found = FileSystemReader(str(sharded)).read_metadata().state_dict_metadata
        return [name.removeprefix("model.") for name in found]
    return list(load_file(folder / "model.safetensors"))


def trainer(kind: str, folder: str, resume: bool = False) -> dict[str, Any]:
    """transformers' Trainer: four steps with a checkpoint after two, or the last two again from there."""
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(True)
    lora = adapted(kind, "copies", seed=3 if not resume else 99)
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4 // dist.get_world_size(),
        max_steps=4,
        save_steps=2,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_broadcast_buffers=False,
    )
    made = Trainer(model=lora, args=arguments, train_dataset=Rows())
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(Rows())  # type: ignore[method-assign]
    made.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2") if resume else None)
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    made.save_model(str(Path(folder) / "final"))
    dist.barrier()
    wrapped = made.model_wrapped
    return {"losses": losses, "ddp": isinstance(wrapped, DistributedDataParallel), "adapter": state_of(lora)}


def state_of(lora: LoraModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trained(lora).items()}
