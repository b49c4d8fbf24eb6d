"""Measuring perplexity, and the fine-tune itself: transformers' stock Trainer."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..model.lora_model import LoraModel
from .settings import Settings


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch: int = 8) -> float:
    """exp of the mean next-token loss over ``rows`` (n, window), every token but a row's first counted once."""
    model.eval()
    total = 0.0
    for part in rows.split(batch):
        part = part.to(model.device)
        total += model(input_ids=part, labels=part).loss.item() * len(part)
    return math.exp(total / len(rows))


def fine_tune_(lora: LoraModel, rows: Tensor, settings: Settings, title: str) -> list[float]:
    """Train the adapters on ``rows`` (n, window) in place; the loss of every step.

    The order of the rows depends on ``settings.seed`` alone, so every start sees the same batches.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, settings.steps // 10),
            seed=settings.seed,
            use_cpu=settings.device == "cpu",
            bf16=settings.device != "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=settings.device != "cpu",
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(model=lora, args=arguments, train_dataset=data, callbacks=[_Bar(title)])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    lora.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Bar(TrainerCallback):
    """One progress bar per fine-tune, gone when it is done."""

    def __init__(self, title: str) -> None:
        self.title = title

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.title, unit="step", leave=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()
