"""What the ranks do in the tests of DeepSpeed where accelerate, or transformers' Trainer, starts it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from engine_models import ROWS, Rows, adapted, batch, optimizer, trained
from jobs_of_engines import stepper
from jobs_of_sharded_files import message_of
from tiny_llama import load

from qlora_kit import LoraConfig, LoraModel, apply_lora, quantize_
from qlora_kit.distributed import leave_base_out_, save_checkpoint

#: A stage of ZeRO and a base.
Run = tuple[int, str]
ADAPTER = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def settings(stage: int, **more: Any) -> dict[str, Any]:
    """DeepSpeed's configuration: torch's optimizer as it is, and parameters in pieces however small they are."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more}
    return {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}


def about(model: Any, optimizer: Any) -> dict[str, Any]:
    """What shows that the engine is there, and that it shares out what its stage says."""
    parameters = dict(model.module.named_parameters())
    return {
        "engine": type(model).__name__,
        "optimizer": type(optimizer).__name__,
        "shapes": {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()},
        "partitions": {name: p.ds_tensor.ds_numel for name, p in parameters.items() if hasattr(p, "ds_tensor")},
        "stepped": sum(flat.numel() for flat in getattr(optimizer, "single_partition_of_fp32_groups", ())),
        "trained": sum(p.numel() for p in parameters.values() if p.requires_grad),
    }


def begin() -> None:
    """accelerate as if for the first time, and nothing said that would keep DeepSpeed out."""
    AcceleratorState._reset_state(True)
    os.environ.pop("ACCELERATE_USE_CPU", None)


def accelerated(stage: int) -> Accelerator:
    """accelerate's own start of DeepSpeed. With ``cpu=True`` it would leave DeepSpeed out, and without a backend's name
    take each process for the only one."""
    begin()
    own = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 0.0}
    plugin = DeepSpeedPlugin(hf_ds_config=settings(stage, stage3_gather_16bit_weights_on_model_save=True) | own)
    return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])


def loop(runs: Sequence[Run], folder: str) -> dict[Run, Any]:
    """A loop of one's own: two steps, a state, two more, and these again from the state."""
    found: dict[Run, Any] = {}
    for stage, kind in runs:
        place = Path(folder) / f"{stage} {kind}"
        accelerator = accelerated(stage)
        lora = leave_base_out_(adapted(kind, "copies", seed=3))
        model, stepped = accelerator.prepare(lora, optimizer(list(trained(lora).values())))
        own = about(model, stepped.optimizer)
        step = stepper(accelerator, model, stepped)
        lora.save_pretrained(place / "begun")
        first = [step(0), step(1)]
        accelerator.save_state(str(place / "state"), exclude_frozen_parameters=True)
        save_checkpoint(place / "checkpoint", lora, stepped)
        then = [step(2), step(3)]
        lora.save_pretrained(place / "adapter")
        accelerator.load_state(str(place / "state"))
        again = [step(2), step(3)]
        lora.save_pretrained(place / "again")
        gathered = accelerator.get_state_dict(model)
        if accelerator.is_main_process:  # as accelerate's own examples save
            lora.save_pretrained(place / "gathered", state_dict=gathered, is_main_process=True)
        dist.barrier()
        found[stage, kind] = own | {
            "processes": accelerator.num_processes,
            "losses": first + then,
            "again": again,
            "unwrapped": accelerator.unwrap_model(model) is lora,
            "state": keys_of(place / "state"),
            "names": list(trained(lora)),
        }
    found[0, "float32"] = plugin_on_a_cpu()
    return found


def keys_of(folder: Path) -> list[str]:
    """Names of the tensors of the model in what DeepSpeed has saved."""
    names: set[str] = set()
    for file in folder.rglob("*model_states.pt"):
        stored = torch.load(file, weights_only=False)
        names.update(stored["module"], *(stored[k] or () for k in ("frozen_param_shapes", "frozen_param_fragments")))
    return sorted(names)


def nf4_loaded(folder: Path) -> LoraModel:
    """The model in ``folder``, quantized by transformers as it loads, with an adapter."""
    model = load(folder, "4-bit", torch.float32)
    torch.manual_seed(3)
    return apply_lora(model, ADAPTER).train()


def loaded_later(folder: str) -> dict[str, Any]:
    """What is had of models that are loaded once ZeRO-3 is there: transformers cuts dense ones while it loads them."""
    accelerator = accelerated(3)
    dense = transformers.LlamaForCausalLM.from_pretrained(folder)
    found: dict[str, Any] = {
        "elements": sum(parameter.numel() for parameter in dense.parameters()),
        "said": [message_of(lambda: apply_lora(dense, ADAPTER)), message_of(lambda: quantize_(dense, 2))],
    }
    lora = nf4_loaded(Path(folder))
    model, stepped = accelerator.prepare(lora, optimizer(list(trained(lora).values())))
    found |= about(model, stepped.optimizer)
    found["losses"] = [stepper(accelerator, model, stepped)(i) for i in range(3)]
    aware = adapted("nf4", "merge-aware")  # which nothing of ours has looked at before its first step
    prepared = accelerated(3).prepare(aware, optimizer(list(trained(aware).values())))[0]
    found["aware"] = message_of(lambda: prepared(input_ids=batch(0)))
    return found


def plugin_on_a_cpu() -> str:
    """The engine that accelerate makes where it is told to stay on the CPU."""
    begin()
    own = {"train_micro_batch_size_per_gpu": 2}
    accelerator = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings(2) | own))
    lora = adapted("float32")
    return type(accelerator.prepare(lora, optimizer(list(trained(lora).values())))[0]).__name__


def trainer(runs: Sequence[Run], folder: str, peft: bool = True) -> dict[Run, Any]:
    """transformers' Trainer: four steps with a checkpoint after two, and the last two again from there, by adapters
    that began elsewhere. Stage 0 is without DeepSpeed. Without PEFT a Trainer doesn't take the model for one of its.
    """
    if not peft:
        transformers.trainer._is_peft_model = lambda model: False
    found: dict[Run, Any] = {}
    for stage, kind in runs:
        place = Path(folder) / f"{stage} {kind}"
        own = by_trainer(stage, kind, place, 3, peft)
        last = by_trainer(stage, kind, place, 99, peft, resume_from_checkpoint=str(place / "checkpoint-2"))
        found[stage, kind] = own | {"again": last["losses"][-2:]}
    return found


def by_trainer(stage: int, kind: str, place: Path, seed: int, gathers_little: bool, **options: Any) -> dict[str, Any]:
    begin()
    engine = None
    if stage:
        more = {} if gathers_little else {"stage3_gather_16bit_weights_on_model_save": True}
        engine = settings(stage, **more) | {"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto"}
    arguments = transformers.TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=ROWS // dist.get_world_size(),
        max_steps=4,
        save_steps=2,
        learning_rate=2e-3,
        adam_epsilon=1e-2,  # as engine_models' optimizer
        lr_scheduler_type="constant",
        max_grad_norm=0.1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        deepspeed=engine,
    )
    lora = adapted(kind, "copies", seed=seed)
    made = transformers.Trainer(model=lora, args=arguments, train_dataset=Rows())
    made._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(Rows())  # type: ignore[method-assign]
    made.train(**options)
    name = "final" if not options else "resumed"
    made.save_model(str(place / name))
    lora.save_pretrained(place / f"{name} by every rank")
    dist.barrier()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    wrapped = made.model_wrapped
    return {"losses": losses, **(about(wrapped, wrapped.optimizer) if stage else {})}
