"""Chunked losses, offloading and optimizers in the stock trainers: the runs they don't change, and those they
resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpointing import ARGUMENT
from datasets import Dataset
from tiny_llama import llama
from tiny_lm import write_tiny_lm
from torch import nn
from torch.optim import Optimizer
from training_runs import (
    SAVED_AT,
    STEPS,
    Run,
    arguments,
    assert_same,
    config,
    finished,
    load_storage,
    rows,
    sft_trainer,
    trained,
    wrapped,
)
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from qlora_kit import LoraModel
from qlora_kit.training import offload, offload_activations, use_chunked_loss
from qlora_kit.training.deferred_logits import Source
from qlora_kit.training.optimizers import lora_fa_, lora_plus, optimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]
PLAIN = {"lora_dropout": 0.0, "init_lora_weights": False}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Source]:
    """The calls of heads that deferred their logits."""
    found: list[Source] = []
    start = Source.__post_init__
    monkeypatch.setattr(Source, "__post_init__", lambda self: (start(self), found.append(self))[0])
    return found


# -- the loss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {ARGUMENT: True},
        {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2},
        {"bf16": True},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_run_with_chunks_is_the_run_without(settings: dict[str, Any], tmp_path: Path, calls: list[Source]) -> None:
    def run(name: str, chunk: int | None) -> Run:
        lora = wrapped(llama(), config(**PLAIN))
        if chunk is not None:
            use_chunked_loss(lora, chunk=chunk)
            calls.clear()
        return trained(lora, tmp_path / name, save_strategy="no", **settings)

    plain, chunked = run("plain", None), run("chunked", 5)
    assert len(chunked.losses) == STEPS
    assert chunked.losses[0] == pytest.approx(plain.losses[0], rel=1e-5)
    # Gradients are rounded once more in half precision, and Adam makes steps of one size of the least of them.
    assert chunked.losses == pytest.approx(plain.losses, rel=5e-3 if "bf16" in settings else 1e-4)
    evaluated = [[e["eval_loss"] for e in r.trainer.state.log_history if "eval_loss" in e] for r in (plain, chunked)]
    assert evaluated[1] == pytest.approx(evaluated[0], rel=1e-4)
    assert all(source.losses == 1 for source in calls)
    assert not any(source.computed_for for source in calls)  # no logits of all tokens, in training and evaluation


def test_metrics_that_need_logits_get_them(tmp_path: Path) -> None:
    lora = wrapped(llama(), config(**PLAIN))

    def accuracy(predicted: Any) -> dict[str, float]:
        right = predicted.predictions.argmax(-1)[:, :-1] == predicted.label_ids[:, 1:]
        return {"accuracy": float(np.mean(right))}

    args = arguments(TrainingArguments, tmp_path)
    trainer = Trainer(lora, args, train_dataset=rows(4), eval_dataset=rows(4), compute_metrics=accuracy)
    expected, logits = trainer.evaluate(), trainer.predict(rows(4)).predictions
    use_chunked_loss(lora, chunk=5)
    found = trainer.evaluate()
    assert found["eval_accuracy"] == expected["eval_accuracy"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert np.array_equal(trainer.predict(rows(4)).predictions, logits)


@pytest.mark.parametrize("storage", ["dense", "4-bit"])
def test_sft_trainer_computes_its_own_and_isnt_disturbed(storage: str, tmp_path: Path, lm: Path) -> None:
    """TRL scores hidden states by the head's weight, in tiles: it never asks the head for logits."""

    def run(name: str, chunked: bool) -> Run:
        lora = wrapped(load_storage(lm, storage), config(**PLAIN))
        if chunked:
            use_chunked_loss(lora, chunk=5)
        return finished(sft_trainer(lora, lm, tmp_path / name, save_strategy="no", max_steps=3), None)

    plain, chunked = run("plain", False), run("chunked", True)
    assert chunked.losses == plain.losses
    keys = ("mean_token_accuracy", "entropy")
    assert [[log[key] for key in keys] for log in chunked.trainer.state.log_history if "entropy" in log] == [
        [log[key] for key in keys] for log in plain.trainer.state.log_history if "entropy" in log
    ]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing:FutureWarning")  # peft reads it
def test_sft_trainer_that_is_given_a_configuration(tmp_path: Path, lm: Path) -> None:
    model = load_storage(lm, "dense")
    use_chunked_loss(model, chunk=5)
    args = arguments(SFTConfig, tmp_path, save_strategy="no", max_steps=2, bf16=False, **{ARGUMENT: False})
    text, tokenizer = Dataset.from_list([{"text": "one two three"}] * 8), AutoTokenizer.from_pretrained(lm)
    run = finished(SFTTrainer(model, args, train_dataset=text, processing_class=tokenizer, peft_config=config()), None)
    assert len(run.losses) == 2
    assert issubclass(type(run.trainer.model), LoraModel)


# -- offloading ------------------------------------------------------------------------------------------------


def test_a_run_with_activations_elsewhere_is_the_run_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_CPU", "another place")  # so that there is something to move without a GPU

    def run(name: str, move: bool) -> list[float]:
        lora = wrapped(llama())
        moved = offload_activations(lora, least_bytes=0) if move else None
        losses = trained(lora, tmp_path / name, **{ARGUMENT: True}, max_steps=3).losses
        assert moved is None or moved.moved > 0
        return losses

    assert run("moved", True) == run("plain", False)


# -- optimizers ------------------------------------------------------------------------------------------------

MAKERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "lora+": lambda model: lora_plus(model, lr=1e-2, ratio=4.0),
    "lora+, 8 bits": lambda model: lora_plus(model, "adamw_8bit", lr=1e-2, ratio=4.0),
    "lora-fa": lambda model: lora_fa_(model, lr=1e-2),
    "lora-fa, 8 bits": lambda model: lora_fa_(model, "adamw_8bit", lr=1e-2),
    "8 bits, paged": lambda model: optimizer("paged_adamw_8bit", model, lr=1e-2),
    "lion": lambda model: optimizer("lion_8bit", model, lr=1e-2),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_resumed_run_is_the_uninterrupted_one(maker: str, tmp_path: Path) -> None:
    def run(seed: int, resume: Path | None) -> Run:
        lora = wrapped(llama(), config(r=64), seed=seed)  # large enough for states of 8 bits
        made = MAKERS[maker](lora)
        args = arguments(TrainingArguments, tmp_path)
        return finished(Trainer(lora, args, train_dataset=rows(24), optimizers=(made, None)), resume)

    whole = run(1, None)
    resumed = run(1, tmp_path / f"checkpoint-{SAVED_AT}")
    assert len(whole.losses) == STEPS
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)
    rates = {group["lr"] for group in whole.trainer.optimizer.param_groups}
    assert len(rates) == (2 if "lora+" in maker else 1) or rates == {0.0}  # the schedule ends at zero
    if "lora-fa" in maker:
        A = [p for name, p in resumed.lora.named_parameters() if "lora_A" in name]
        fresh = [p for name, p in wrapped(llama(), config(r=64), seed=1).named_parameters() if "lora_A" in name]
        assert all(torch.equal(one, other) for one, other in zip(A, fresh, strict=True))
