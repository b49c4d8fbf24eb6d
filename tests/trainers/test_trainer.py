"""transformers' Trainer, the stock class, on what ``apply_lora`` returns: dense, 4-bit and 8-bit."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpointing import ARGUMENT, is_checkpointing
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_llama import STORAGES, llama
from tiny_lm import write_tiny_lm
from training_runs import (
    SAVED_AT,
    STEPS,
    Run,
    arguments,
    assert_adapters_only,
    assert_all_changed,
    assert_same,
    base_tensors,
    config,
    load_storage,
    rows,
    trained,
    wrapped,
)
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from qlora_kit import AdapterError, LoftQConfig, LoraModel, StorageError
from qlora_kit.adapter_files.tensors import adapter_state


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with biases in its attention, and its output head apart from the embedding."""
    path = tmp_path_factory.mktemp("llama")
    llama(attention_bias=True).save_pretrained(path)
    return path


# -- evaluation ----------------------------------------------------------------------------------------------


# Without dropout: to shuffle or not, every pass over a data loader draws a seed from torch's generator, so an
# evaluation moves the dropout masks after it, with any model.
@pytest.mark.parametrize("prepare", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_evaluation_during_training_changes_nothing(storage: str, prepare: bool, tmp_path: Path, folder: Path) -> None:
    targets = {"target_modules": "all-linear" if prepare else ["q_proj"], "lora_dropout": 0.0}

    def run(name: str, **settings: Any) -> Run:
        lora = wrapped(load_storage(folder, storage), config(**targets), prepare=prepare)
        before = base_tensors(lora)
        run = trained(lora, tmp_path / name, **settings)
        assert_same(base_tensors(lora), before)
        return run

    plain = run("plain")
    evaluated = run("evaluated", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert len([e for e in evaluated.trainer.state.log_history if "eval_loss" in e]) == STEPS + 1
    assert evaluated.losses == plain.losses
    assert len(plain.losses) == STEPS
    assert_same(evaluated.adapters, plain.adapters)


# -- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_checkpoints_hold_the_adapters_only(storage: str, tmp_path: Path, folder: Path) -> None:
    run = trained(wrapped(load_storage(folder, storage)), tmp_path, max_steps=2, save_steps=2)
    checkpoint = tmp_path / "checkpoint-2"
    assert_adapters_only(checkpoint, run)
    again = LoraModel.from_pretrained(load_storage(folder, storage), checkpoint)
    assert_same(adapter_state(again), adapter_state(run.lora))
    theirs = get_peft_model_state_dict(PeftModel.from_pretrained(load_storage(folder, storage), checkpoint))
    assert_same(theirs, adapter_state(run.lora))
    run.trainer.save_model(str(tmp_path / "saved"))
    assert_same(load_file(tmp_path / "saved" / "adapter_model.safetensors"), adapter_state(run.lora))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(
    storage: str, checkpointing: bool, tmp_path: Path, folder: Path
) -> None:
    settings = {ARGUMENT: checkpointing, "eval_strategy": "steps", "eval_steps": 2}
    whole = trained(wrapped(load_storage(folder, storage)), tmp_path, **settings)
    lora = wrapped(load_storage(folder, storage), seed=99)  # other factors than the first run began with
    assert_all_changed(adapter_state(lora), adapter_state(whole.lora))
    resumed = trained(lora, tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}", **settings)
    assert is_checkpointing(lora) is checkpointing
    assert resumed.losses == whole.losses  # the log of the steps before is the checkpoint's
    assert_same(resumed.adapters, whole.adapters)
    assert all(p.dtype == torch.float32 for p in lora.parameters() if p.requires_grad)


@pytest.mark.parametrize("storage", ["dense", "4-bit"])
@pytest.mark.slow
def test_a_run_from_loftq_resumes_on_a_base_made_the_same_way(storage: str, tmp_path: Path, folder: Path) -> None:
    """LoftQ may replace the base's weights, which no checkpoint holds: the same call makes them again."""

    def started(seed: int) -> LoraModel:
        loftq = LoftQConfig(loftq_iter=2, weights=None if storage == "dense" else str(folder))
        return wrapped(load_storage(folder, storage), config(init_lora_weights="loftq", loftq_config=loftq), seed=seed)

    whole = trained(started(seed=1), tmp_path)
    resumed = trained(started(seed=99), tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}")
    assert_same(base_tensors(resumed.lora), base_tensors(whole.lora))
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)


@pytest.mark.parametrize("in_use", [["default"], ["second"], ["default", "second"]])
@pytest.mark.slow
def test_adapters_in_use_are_trained_and_resumed(in_use: list[str], tmp_path: Path, folder: Path) -> None:
    whole_modules = {"bias": "lora_only", "modules_to_save": ["lm_head"], "init_lora_weights": False}

    def two_adapters(seed: int) -> LoraModel:
        lora = wrapped(load_storage(folder, "4-bit"), config(**whole_modules), seed=seed)
        lora.add_adapter("second", config(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        lora.set_adapter(in_use)
        return lora

    lora = two_adapters(seed=1)
    start = {name: adapter_state(lora, name) for name in lora.peft_config}
    whole = trained(lora, tmp_path)
    for name, before in start.items():
        (assert_all_changed if name in in_use else assert_same)(adapter_state(lora, name), before)
    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    stored = load_file(checkpoint / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"} <= (
        stored.keys()
    )
    assert (checkpoint / "second" / "adapter_model.safetensors").is_file()
    other = two_adapters(seed=99)
    resumed = trained(other, tmp_path, resume=checkpoint)
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)


@pytest.mark.slow
def test_a_checkpoint_of_other_adapters_is_refused(tmp_path: Path, folder: Path) -> None:
    trained(wrapped(load_storage(folder, "dense")), tmp_path)
    lora = wrapped(load_storage(folder, "dense"), config(r=8))
    before = adapter_state(lora)
    with pytest.raises(StorageError, match=r"0 missing, 0 unexpected and \d+ mis-shaped.*nothing was loaded"):
        trained(lora, tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}")
    assert_same(adapter_state(lora), before)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(storage: str, tmp_path: Path, folder: Path) -> None:
    # The learning rate climbs from 0 to far too much, so the last steps are the worst.
    run = trained(
        wrapped(load_storage(folder, storage)),
        tmp_path,
        learning_rate=10.0,
        warmup_steps=STEPS,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
    )
    best = Path(run.trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    assert_same(adapter_state(run.lora), load_file(best / "adapter_model.safetensors"))
    assert_all_changed(
        adapter_state(run.lora), load_file(tmp_path / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    )
    assert run.trainer.evaluate()["eval_loss"] == run.trainer.state.best_metric


def test_uploads_are_of_adapters(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = wrapped(load_storage(folder, "4-bit"))
    with pytest.raises(AdapterError, match=r"push_to_hub=True: save_pretrained writes to a folder only"):
        lora.save_pretrained(tmp_path, push_to_hub=True)
    assert not list(tmp_path.iterdir())
    uploads: list[list[str]] = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda self, folder_path, **_: uploads.append(os.listdir(folder_path))
    )
    lora.push_to_hub("me/adapter")
    assert [sorted(names) for names in uploads] == [["README.md", "adapter_config.json", "adapter_model.safetensors"]]


# -- what the Trainer learns about the model -----------------------------------------------------------------


def test_columns_labels_and_predictions_are_those_of_the_base(tmp_path: Path, folder: Path) -> None:
    lora = wrapped(load_storage(folder, "4-bit"))
    # A column that the base's forward doesn't know must go, those that it knows must stay.
    data = Dataset.from_list([{**{k: v.tolist() for k, v in row.items()}, "remark": "none"} for row in rows(4)])
    trainer = Trainer(model=lora, args=arguments(TrainingArguments, tmp_path), train_dataset=data, eval_dataset=data)
    assert trainer.label_names == ["labels"]
    assert trainer.model_accepts_loss_kwargs
    (batch, *_) = trainer.get_train_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    before = base_tensors(lora)
    loss = trainer.evaluate()["eval_loss"]
    predicted = trainer.predict(data)
    assert predicted.metrics["test_loss"] == loss
    lora.eval()
    with torch.no_grad():
        direct = lora(**{key: torch.stack([row[key] for row in rows(4)]) for key in rows(1)[0]})
    assert torch.equal(torch.from_numpy(predicted.predictions), direct.logits.float())
    assert direct.loss.item() == pytest.approx(loss, rel=1e-6)
    assert_same(base_tensors(lora), before)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 3}])
@pytest.mark.slow
def test_losses_are_counted_as_for_the_base_model(settings: dict[str, Any], tmp_path: Path, folder: Path) -> None:
    """At B = 0 the wrapper computes what the bare model does, so both must log the same first loss."""
    uneven = [{**row, "labels": row["labels"].masked_fill(torch.arange(12) < i, -100)} for i, row in enumerate(rows(6))]

    def first_loss(model: Any) -> float:
        args = arguments(TrainingArguments, tmp_path, max_steps=1, save_strategy="no", **settings)
        trainer = Trainer(model=model, args=args, train_dataset=uneven)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    bare = load_storage(folder, "dense")
    loss = first_loss(wrapped(load_storage(folder, "dense"), config(lora_dropout=0.0), prepare=False))
    assert loss == first_loss(bare)


class UnderAutocast(TrainerCallback):
    """Notes whether the base model's forward ran under autocast."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: LoraModel, **_: Any) -> None:
        self.seen: set[bool] = set()
        inner = model.model.model
        inner.register_forward_pre_hook(lambda *_: self.seen.add(torch.is_autocast_enabled("cpu")))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_mixed_precision_leaves_adapters_in_float32(storage: str, tmp_path: Path, folder: Path) -> None:
    callback = UnderAutocast()
    lora = wrapped(load_storage(folder, storage))
    start = adapter_state(lora)
    settings = {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}
    whole = trained(lora, tmp_path, callback=callback, **settings)
    assert callback.seen == {True}
    assert {p.dtype for p in lora.parameters() if p.requires_grad} == {torch.float32}
    assert_all_changed(adapter_state(lora), start)
    resumed = trained(
        wrapped(load_storage(folder, storage), seed=9), tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}", **settings
    )
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)
    # The forward that mixed precision put in place belongs to each copy of the model.
    lora.eval()
    batch = {key: value[None] for key, value in rows(1)[0].items()}
    with torch.no_grad():
        logits = lora(**batch).logits
        twin = copy.deepcopy(lora)
        twin.delete_adapter("default")
        assert not torch.equal(twin(**batch).logits, logits)
        assert torch.equal(lora(**batch).logits, logits)


@pytest.mark.slow
def test_a_stock_collator_and_tokenizer(tmp_path: Path) -> None:
    lm = write_tiny_lm(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(lm)
    text = [{"input_ids": tokenizer(f"the number {i}")["input_ids"]} for i in range(95, 105)]
    trainer = Trainer(
        model=wrapped(load_storage(lm, "4-bit")),
        args=arguments(TrainingArguments, tmp_path, max_steps=2, save_strategy="no"),
        train_dataset=text,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    assert trainer.train().training_loss > 0
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "tokenizer.json").is_file()


# -- without peft --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_all_works_without_peft(tmp_path: Path) -> None:
    script = Path(__file__).with_name("without_peft.py")
    # With None in its place an import of peft fails, and find_spec finds nothing: as if it weren't installed.
    hide_and_run = "import runpy, sys; sys.modules['peft'] = None; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", hide_and_run, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [script.parent, *script.parents[1:3]]))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    passed = [line for line in done.stdout.splitlines() if line.endswith("resumed as uninterrupted, without peft")]
    assert [line.split(":")[0] for line in passed] == ["Trainer", "SFTTrainer"]
