"""Training in float16 with loss scaling, as on GPUs without bfloat16, and in bfloat16: stock Trainer, twenty steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import ARGUMENT
from on_device import DEVICE, need_dtype
from tiny_llama import VOCABULARY, load
from torch import Tensor
from transformers import Trainer, TrainingArguments

from qlora_kit import LoraConfig, apply_lora, prepare_model_for_kbit_training, quantize_

pytestmark = pytest.mark.cuda
STEPS = 20


def rows(count: int) -> list[dict[str, Tensor]]:
    """Runs of numbers, each the last plus one: what a model can learn in a few steps."""
    starts = torch.randint(1, VOCABULARY - 12, (count,), generator=torch.Generator().manual_seed(3))
    lines = starts[:, None] + torch.arange(12)
    return [{"input_ids": line, "attention_mask": torch.ones_like(line), "labels": line} for line in lines]


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("storage", ["dense", "4-bit", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_goes_down(
    dtype: torch.dtype, storage: str, checkpointed: bool, form: str, llama_dir: Path, tmp_path: Path
) -> None:
    need_dtype(dtype)
    if storage == "4-bit":
        pytest.importorskip("bitsandbytes")
    model: Any = load(llama_dir, "dense" if storage == "packed" else storage, dtype, device_map=DEVICE)
    model = quantize_(model, 2) if storage == "packed" else model
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointed)
    lora = apply_lora(model, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"))
    mixed = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        use_cpu=DEVICE == "cpu",
        **{mixed: DEVICE == "cuda", ARGUMENT: checkpointed},
    )
    trainer = Trainer(model=lora, args=arguments, train_dataset=rows(64))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses), losses
    assert sum(losses[-3:]) < 0.97 * sum(losses[:3]), losses  # a random base with a frozen head learns little more
    for name, parameter in lora.named_parameters():
        if parameter.requires_grad:
            assert (parameter.dtype, parameter.device.type) == (torch.float32, DEVICE), name
            assert torch.isfinite(parameter).all(), name
