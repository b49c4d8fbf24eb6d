"""TRL's preference, reward and policy trainers, the stock classes, on our models and with our configurations.

They ask whether a model is PEFT's. If it isn't, those with a reference load a second, dense base for it; if it is, the
reference is the model itself with its adapters off, or a copy of the adapter as it was when training began.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from preference_runs import REFERENCED, TRAINERS, base_for, losses, trainer_of
from tiny_lm import write_tiny_lm
from training_runs import assert_all_changed, assert_same, base_tensors, config, load_storage, wrapped
from transformers import LlamaForCausalLM

from qlora_kit import AdapterError, LoftQConfig, LoraConfig, LoraModel, apply_lora, quantize_
from qlora_kit.adapter_files.tensors import adapter_state

# TRL says so of what it keeps in trl.experimental, and of ORPO's collator.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*trl.experimental"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # TRL reads it
    pytest.mark.filterwarnings("ignore:When using DPODataCollatorWithPadding"),
]
FRESH = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lm(tmp_path_factory.mktemp("lm"))


def settings_of(name: str) -> LoraConfig:
    return config(**FRESH, modules_to_save=["score"] if name == "Reward" else None)


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("how", ["wrapped", "peft_config"])
@pytest.mark.parametrize("name", TRAINERS)
def test_two_steps_of_every_trainer(name: str, how: str, lm: Path, tmp_path: Path) -> None:
    base = base_for(name, lm)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    torch.manual_seed(1)
    if how == "wrapped":
        trainer = trainer_of(name, apply_lora(base, settings_of(name)), lm, tmp_path)
    else:
        trainer = trainer_of(name, base, lm, tmp_path, peft_config=settings_of(name))
    lora = trainer.model
    assert issubclass(type(lora), LoraModel)
    assert getattr(trainer, "ref_model", None) is None, "a second copy of the base"
    start = adapter_state(lora)
    trainer.train()
    assert len(losses(trainer)) == 2
    if name == "DPO":
        assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert_all_changed(adapter_state(lora), start)
    assert (tmp_path / "checkpoint-1" / "adapter_model.safetensors").is_file()
    assert ("ref" in lora.peft_config) == (how == "wrapped" and name in REFERENCED)
    unloaded = lora.unload()
    assert unloaded is base
    assert_same(dict(unloaded.state_dict()), before)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_resumed_run_is_the_uninterrupted_one(name: str, lm: Path, tmp_path: Path) -> None:
    def model(seed: int) -> LoraModel:
        torch.manual_seed(seed)
        return apply_lora(base_for(name, lm), settings_of(name))

    whole = trainer_of(name, model(1), lm, tmp_path)
    whole.train()
    resumed = trainer_of(name, model(9), lm, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert losses(resumed) == losses(whole)
    assert_same(adapter_state(resumed.model), adapter_state(whole.model))
    if "ref" in whole.model.peft_config:
        assert_same(adapter_state(resumed.model, "ref"), adapter_state(whole.model, "ref"))


@pytest.mark.parametrize("storage", ["dense", "4-bit", "8-bit", "packed"])
@pytest.mark.parametrize("start", ["fresh", "trained", "loftq"])
def test_the_reference_is_the_policy_at_the_start(storage: str, start: str, lm: Path, tmp_path: Path) -> None:
    if storage == "packed":
        model: Any = base_for("DPO", lm)
        quantize_(model, bits=3)
    else:
        model = load_storage(lm, storage)
    own: dict[str, Any] = {"init_lora_weights": start != "trained"}
    if start == "loftq":
        bits = 3 if storage == "packed" else 8 if storage == "8-bit" else 4
        weights = None if storage == "dense" else str(lm)
        own = {
            "init_lora_weights": "loftq",
            "loftq_config": LoftQConfig(loftq_bits=bits, weights=weights, method="loftq"),
        }
    lora = wrapped(model, config(**FRESH, **own), prepare=storage != "packed")
    frozen, count = base_tensors(lora), parameters(lora)
    trainer = trainer_of("DPO", lora, lm, tmp_path, max_steps=1, save_strategy="no")
    added = sum(tensor.numel() for tensor in adapter_state(lora, "ref").values())
    assert parameters(trainer.model) == count + added
    assert trainer.ref_model is None
    assert_same(adapter_state(lora, "ref"), adapter_state(lora))
    trainer.train()
    # Nothing but the order of sums of half-precision numbers may differ.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    now = base_tensors(lora)
    assert_same({key: now[key] for key in frozen}, frozen)
    assert lora.active_adapters == ["default"]


def test_losses_are_those_of_pefts_own_model(lm: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = apply_lora(base_for("DPO", lm), config(**FRESH, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(base_for("DPO", lm), tmp_path / "adapter", is_trainable=True)
    ours = trainer_of("DPO", lora, lm, tmp_path / "ours")
    ours.train()
    reference = trainer_of("DPO", theirs, lm, tmp_path / "theirs")
    reference.train()
    assert losses(ours) == pytest.approx(losses(reference), rel=1e-5)


def test_the_best_checkpoint_brings_back_every_adapter_in_use(lm: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lora = apply_lora(base_for("DPO", lm), config(**FRESH, init_lora_weights=False))
    lora.add_adapter("second", config(**FRESH, init_lora_weights=False))
    for in_use in (["second"], ["default", "second"]):
        lora.set_adapter(in_use)
        states = {name: adapter_state(lora, name) for name in lora.peft_config}
        out = tmp_path / "-".join(in_use)
        trainer = trainer_of("ORPO", lora, lm, out, max_steps=1)
        trainer.train()
        checkpoint = out / "checkpoint-1"
        trained = {name: adapter_state(lora, name) for name in lora.peft_config}
        with torch.no_grad():
            for parameter in lora.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        # What transformers' Trainer does at the end with load_best_model_at_end.
        trainer.state.best_model_checkpoint = str(checkpoint)
        trainer._load_best_model()
        for name in lora.peft_config:
            assert_same(adapter_state(lora, name), trained[name])
            if name not in in_use:
                assert_same(trained[name], states[name])


def test_two_ways_at_once_and_heads_are_refused(lm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        trainer_of("DPO", apply_lora(base_for("DPO", lm), config()), lm, tmp_path, peft_config=config())
    untied = LlamaForCausalLM.from_pretrained(lm, dtype=torch.float32, tie_word_embeddings=False)
    on_head = apply_lora(untied, config(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="Applying a PEFT adapter to `lm_head` is not supported"):
        trainer_of("DPO", on_head, lm, tmp_path)
    lora = apply_lora(base_for("DPO", lm), config(bias="all"))
    with pytest.raises(AdapterError, match="bias='all' would train the base's biases"):
        trainer_of("DPO", lora, lm, tmp_path)


def test_a_start_that_cant_be_made_twice_is_copied(lm: Path) -> None:
    loftq = config(**FRESH, init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_iter=2, weights=str(lm)))
    lora = wrapped(load_storage(lm, "4-bit"), loftq)
    lora.add_adapter("twin", lora.peft_config["default"])
    assert_same(adapter_state(lora, "twin"), adapter_state(lora))
    assert lora.backbones["twin"] == lora.backbones["default"]
    lora.add_adapter("third", config(**FRESH))
    lora.add_adapter("fresh", lora.peft_config["third"])  # random numbers can be drawn anew
    assert not torch.equal(*(next(iter(adapter_state(lora, name).values())) for name in ("third", "fresh")))
