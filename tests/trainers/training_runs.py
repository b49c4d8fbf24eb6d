"""Stock ``Trainer`` and ``SFTTrainer`` runs of a few steps on a tiny Llama, and what may and may not change in one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpointing import ARGUMENT
from safetensors.torch import load_file
from tiny_llama import VOCABULARY, load
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from qlora_kit import LoraConfig, LoraModel, apply_lora, prepare_model_for_kbit_training
from qlora_kit.adapter_files.tensors import adapter_state

WINDOW = 12
STEPS, SAVED_AT = 6, 3

#: What a checkpoint of one adapter holds. The last ones are the Trainer's own; none of them knows the base.
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"}
TRAINER_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin"}

Setup = Callable[[LoraModel], Any]


@dataclass
class Run:
    lora: LoraModel
    trainer: Trainer
    losses: list[float]

    @property
    def adapters(self) -> dict[str, Tensor]:
        """Every tensor of every adapter."""
        names = self.lora.peft_config
        return {f"{n}: {key}": value for n in names for key, value in adapter_state(self.lora, n).items()}


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **settings})


def wrapped(model: nn.Module, settings: LoraConfig | None = None, *, seed: int = 1, prepare: bool = True) -> LoraModel:
    """``model`` with an adapter whose B isn't zero, so that a forgotten adapter shows; drawn from ``seed``."""
    if prepare:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(seed)
    lora = apply_lora(model, config(init_lora_weights=False) if settings is None else settings)
    lora.train()
    return lora


def rows(count: int, seed: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, WINDOW), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def arguments(kind: type[TrainingArguments], out: Path, **settings: Any) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
    pace = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": SAVED_AT}
    return kind(output_dir=str(out), **{**quiet, **pace, **saving, **settings})


def finished(trainer: Trainer, resume: Path | None) -> Run:
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(trainer.model, trainer, losses)


def trained(lora: nn.Module, out: Path, *, resume: Path | None = None, callback: Any = None, **settings: Any) -> Run:
    """transformers' own Trainer, six steps of two rows unless ``settings`` say otherwise."""
    trainer = Trainer(
        model=lora,
        args=arguments(TrainingArguments, out, **settings),
        train_dataset=rows(24),
        eval_dataset=rows(4, seed=4),
        callbacks=[callback] if isinstance(callback, TrainerCallback) else None,
    )
    return finished(trainer, resume)


def sft_trainer(lora: nn.Module, lm: Path, out: Path, **settings: Any) -> Any:
    """TRL's own SFTTrainer on two dozen short sentences; ``lm`` is the folder of the tokenizer."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    text = Dataset.from_list([{"text": f"the number {i} comes before {i + 1}."} for i in range(24)])
    # SFTConfig turns on bfloat16, and checkpointing under its old name, which transformers warns about.
    plain = {"bf16": False, ARGUMENT: False}
    return SFTTrainer(
        model=lora,
        args=arguments(SFTConfig, out, **{**plain, **settings}),
        train_dataset=text,
        eval_dataset=text.select(range(4)),
        processing_class=AutoTokenizer.from_pretrained(lm),
    )


def base_tensors(lora: LoraModel) -> dict[str, Tensor]:
    """Copies of all frozen tensors: dense weights, packed codes, and the scales wherever they are kept."""
    found: dict[str, Tensor] = {}
    for path, module in lora.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not tensor.requires_grad:
                found[f"{path}.{name}"] = tensor.detach().clone()
                state = getattr(tensor, "quant_state", None)
                for part in ("absmax", "offset", "code") if state is not None else ():
                    if getattr(state, part) is not None:
                        found[f"{path}.{name}.{part}"] = getattr(state, part).clone()
                if state is not None and state.nested:
                    found[f"{path}.{name}.nested"] = state.state2.absmax.clone()
        if hasattr(module, "init_8bit_state"):  # int8 scales move from the weight to the state at the first forward
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[f"{path}.scales"] = scales.clone()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert found, "nothing was compared"
    different = [key for key, value in expected.items() if not same(found[key], value)]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:3]}"


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def assert_all_changed(found: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert found.keys() == before.keys()
    unchanged = [key for key, value in before.items() if same(found[key], value)]
    assert not unchanged, f"no step changed {unchanged[:3]}"


def assert_adapters_only(checkpoint: Path, run: Run) -> None:
    """``checkpoint`` holds the adapters and nothing of the base: by file names, tensor names, and bytes."""
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= ADAPTER_FILES | TRAINER_FILES
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "README.md"}
    assert files <= ADAPTER_FILES | TRAINER_FILES | tokenizer
    expected = adapter_state(run.lora)
    assert load_file(checkpoint / "adapter_model.safetensors").keys() == expected.keys()
    copied = load_file(checkpoint / "model.safetensors")
    assert {key.replace(".default.", ".") for key in copied} == expected.keys()
    nbytes = sum(tensor.nbytes for tensor in expected.values())
    for name in ("adapter_model.safetensors", "model.safetensors"):
        assert nbytes < (checkpoint / name).stat().st_size < nbytes + 10_000
    # AdamW: two moments a parameter.
    assert (checkpoint / "optimizer.pt").stat().st_size < 2 * nbytes + 50_000


def load_storage(folder: Path, storage: str) -> nn.Module:
    return load(folder, storage, torch.bfloat16)
