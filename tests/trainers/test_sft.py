"""TRL's SFTTrainer, the stock class, on what ``apply_lora`` returns: dense, 4-bit and 8-bit."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointing import ARGUMENT, is_checkpointing
from safetensors.torch import load_file
from tiny_llama import STORAGES, llama
from tiny_lm import write_tiny_lm
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from training_runs import (
    SAVED_AT,
    STEPS,
    Run,
    assert_adapters_only,
    assert_all_changed,
    assert_same,
    base_tensors,
    config,
    finished,
    load_storage,
    sft_trainer,
    wrapped,
)
from transformers import AutoTokenizer
from trl.trainer.utils import add_fused_lm_head

from qlora_kit import AdapterError, LoftQConfig, LoraModel
from qlora_kit.adapter_files.tensors import adapter_state


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, lm: Path) -> Path:
    """The same tokenizer, and a model whose output head is its own."""
    folder = tmp_path_factory.mktemp("untied")
    llama(vocab_size=257).save_pretrained(folder)
    AutoTokenizer.from_pretrained(lm).save_pretrained(folder)
    return folder


def tuned(lora: nn.Module, lm: Path, out: Path, *, resume: Path | None = None, **settings: Any) -> Run:
    return finished(sft_trainer(lora, lm, out, **settings), resume)


def dtypes(lora: LoraModel) -> set[torch.dtype]:
    return {parameter.dtype for parameter in lora.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(storage: str, checkpointing: bool, tmp_path: Path, lm: Path) -> None:
    settings = {ARGUMENT: checkpointing, "eval_strategy": "steps", "eval_steps": 2}
    lora = wrapped(load_storage(lm, storage))
    start, base = adapter_state(lora), base_tensors(lora)
    whole = tuned(lora, lm, tmp_path, **settings)
    assert is_checkpointing(lora) is checkpointing
    assert_all_changed(adapter_state(lora), start)
    assert_same(base_tensors(lora), base)
    assert dtypes(lora) == {torch.float32}
    checkpoint = tmp_path / f"checkpoint-{SAVED_AT}"
    assert_adapters_only(checkpoint, whole)
    resumed = tuned(wrapped(load_storage(lm, storage), seed=99), lm, tmp_path, resume=checkpoint, **settings)
    assert len(whole.losses) == STEPS
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)
    again = LoraModel.from_pretrained(load_storage(lm, storage), tmp_path / f"checkpoint-{STEPS}")
    assert_same(adapter_state(again), adapter_state(lora))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_evaluation_during_training_changes_nothing(storage: str, tmp_path: Path, lm: Path) -> None:
    def run(name: str, **settings: Any) -> Run:
        return tuned(wrapped(load_storage(lm, storage), config(lora_dropout=0.0)), lm, tmp_path / name, **settings)

    plain = run("plain")
    evaluated = run("evaluated", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    assert evaluated.losses == plain.losses
    assert_same(evaluated.adapters, plain.adapters)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_construction_changes_no_loftq_start(storage: str, tmp_path: Path, lm: Path) -> None:
    loftq = LoftQConfig(loftq_bits=8 if storage == "8-bit" else 4, weights=None if storage == "dense" else str(lm))
    lora = wrapped(load_storage(lm, storage), config(init_lora_weights="loftq", loftq_config=loftq))
    start, base = adapter_state(lora), base_tensors(lora)
    # This start is worth nothing rounded to bfloat16, as SFTTrainer rounds what a quantized model trains.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in start.values())
    trainer = sft_trainer(lora, lm, tmp_path, learning_rate=1e-5)
    assert_same(adapter_state(lora), start)
    assert_same(base_tensors(lora), base)
    finished(trainer, None)
    assert dtypes(lora) == {torch.float32}
    assert_all_changed(adapter_state(lora), start)  # such small steps vanish in bfloat16
    assert_same(base_tensors(lora), base)


@pytest.mark.slow
def test_its_default_of_bfloat16_leaves_adapters_in_float32(tmp_path: Path, lm: Path) -> None:
    lora = wrapped(load_storage(lm, "4-bit"))
    run = tuned(lora, lm, tmp_path, bf16=None)
    assert run.trainer.args.bf16
    assert dtypes(lora) == {torch.float32}
    resumed = tuned(
        wrapped(load_storage(lm, "4-bit"), seed=99), lm, tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}", bf16=None
    )
    assert resumed.losses == run.losses
    assert_same(resumed.adapters, run.adapters)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_the_best_checkpoint_is_loaded_at_the_end(storage: str, tmp_path: Path, lm: Path) -> None:
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    # The loss falls from step to step, so for the best not to be the last, the worst is called the best.
    worst = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    lora = wrapped(load_storage(lm, storage))
    run = tuned(lora, lm, tmp_path, **every_step, **worst)
    best = Path(run.trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    assert_same(adapter_state(lora), load_file(best / "adapter_model.safetensors"))
    assert run.trainer.evaluate()["eval_loss"] == run.trainer.state.best_metric


# -- SFTTrainer computes the loss from the backbone and the head's weight, past the model's own forward --------


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.slow
def test_its_loss_is_that_of_the_bare_model(storage: str, tmp_path: Path, lm: Path) -> None:
    """At B = 0 the wrapper computes what the base does; the base alone is refused only where it is quantized."""
    lora = wrapped(load_storage(lm, storage), config(lora_dropout=0.0))
    trainer = sft_trainer(lora, lm, tmp_path)
    found = trainer.evaluate()["eval_loss"]
    batch = next(iter(trainer.get_eval_dataloader()))
    lora.eval()
    with torch.no_grad():
        expected = lora(**batch).loss.item()
    # Both sum float32 losses of bfloat16 logits, which are rounded where the head is computed in tiles.
    assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
def test_the_model_goes_on_as_before(tmp_path: Path, lm: Path) -> None:
    lora = wrapped(load_storage(lm, "4-bit"))
    signature = list(inspect.signature(lora.forward).parameters)
    tokenizer = AutoTokenizer.from_pretrained(lm)
    tuned(lora, lm, tmp_path)
    prompt = tokenizer("the number 3", return_tensors="pt")
    lora.eval()
    with torch.no_grad():
        logits = lora(**prompt).logits
        copied = copy.deepcopy(lora)
        assert torch.equal(copied(**prompt).logits, logits)
        with lora.disable_adapter():
            assert not torch.equal(lora(**prompt).logits, logits)
    assert signature == list(inspect.signature(lora.forward).parameters)
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert lora.generate(**prompt, **greedy).shape[1] == prompt["input_ids"].shape[1] + 3
    with pytest.raises(ValueError, match=r"model_kwargs.* are not used by the model: \['nonsense'\]"):
        lora.generate(**prompt, **greedy, nonsense=1)
    assert lora.merge_and_unload().generate(**prompt, **greedy).shape[1] == prompt["input_ids"].shape[1] + 3


@pytest.mark.slow
@pytest.mark.parametrize("in_wrapper", [False, True])
def test_an_adapter_on_the_head_is_refused(tmp_path: Path, untied: Path, in_wrapper: bool) -> None:
    model = load_storage(untied, "dense")
    if in_wrapper:
        model.lm_head = checkpoint_wrapper(model.lm_head)
    lora = wrapped(model, config(target_modules=["q_proj", "lm_head"]))
    forward = lora.model.forward
    # TRL's own refusal, since it takes our layers for PEFT's.
    with pytest.raises(ValueError, match=r"the adapter would never be trained. Remove `'lm_head'`"):
        sft_trainer(lora, untied, tmp_path)
    # Without peft there is none; what it then does is to give the model another forward.
    with pytest.raises(AdapterError, match=r"the adapter on it would not train; take the head out of target_modules"):
        add_fused_lm_head(lora)
    assert lora.model.forward == forward


@pytest.mark.parametrize("storage", ["dense", "4-bit"])
@pytest.mark.slow
def test_a_head_trained_whole_is_trained_and_resumed(storage: str, tmp_path: Path, untied: Path) -> None:
    def head(lora: LoraModel) -> Tensor:
        return adapter_state(lora)["base_model.model.lm_head.weight"]

    settings = config(modules_to_save=["lm_head"])
    lora = wrapped(load_storage(untied, storage), settings)
    start, original = head(lora), lora.model.lm_head.original_module.weight.clone()
    whole = tuned(lora, untied, tmp_path)
    assert not torch.equal(head(lora), start)
    assert torch.equal(lora.model.lm_head.original_module.weight, original)
    other = wrapped(load_storage(untied, storage), settings, seed=99)
    resumed = tuned(other, untied, tmp_path, resume=tmp_path / f"checkpoint-{SAVED_AT}")
    assert resumed.losses == whole.losses
    assert_same(resumed.adapters, whole.adapters)


@pytest.mark.slow
def test_noise_on_embeddings_leaves_the_base(tmp_path: Path, lm: Path) -> None:
    lora = wrapped(load_storage(lm, "4-bit"))
    base = base_tensors(lora)
    tuned(lora, lm, tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    assert_same(base_tensors(lora), base)
    assert not lora.model.get_input_embeddings()._forward_hooks
