"""What trainers put on a model stays on the wrapper, or is taken off the base when the adapters leave."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_llama import VOCABULARY, batch, llama
from torch import nn
from training_runs import trained

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge, prepare_model_for_kbit_training, quantize_
from qlora_kit.model.proxy import _ENDS
from qlora_kit.model.replaced import chain

LAST_STEPS = {"max_steps": 1, "save_strategy": "no"}
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
LEAVES = {
    "unload": lambda lora: lora.unload(),
    "merge": lambda lora: merge(lora, into="float32").model,
    "merge_and_unload": lambda lora: lora.merge_and_unload(),
}


def adapter_model() -> LoraModel:
    torch.manual_seed(0)
    return apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=batch()["input_ids"]).logits.float()


def prepared(lora: LoraModel, mixed_precision: str = "bf16") -> Accelerator:
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=mixed_precision)
    assert accelerator.prepare(lora) is lora
    return accelerator


@pytest.fixture(autouse=True)
def no_state() -> Any:
    yield
    AcceleratorState._reset_state(True)


def layers_around(lora: LoraModel) -> list[str]:
    found = chain(lora.forward, _ENDS)
    assert found is not None
    return [layer.__code__.co_name for layer in found[0] if hasattr(layer, "__code__")]


@pytest.mark.parametrize("leave", LEAVES)
def test_the_base_leaves_without_mixed_precision(leave: str) -> None:
    lora = adapter_model()
    prepared(lora)
    under: list[bool] = []
    lora.model.lm_head.register_forward_pre_hook(lambda *_: under.append(torch.is_autocast_enabled("cpu")))
    logits(lora)
    base = LEAVES[leave](lora)
    found = logits(base)
    assert under == [True, False]
    assert not vars(base).keys() & {"forward", "_original_forward"}
    clean = llama()
    clean.load_state_dict(base.state_dict())
    assert torch.equal(found, logits(clean))


@pytest.mark.slow
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_copies_compute_as_the_original_and_by_themselves(how: str, mixed_precision: str) -> None:
    lora = adapter_model()
    prepared(lora, mixed_precision)
    before = logits(lora)
    twin = COPIES[how](lora)
    assert torch.equal(logits(twin), before)
    assert layers_around(twin) == layers_around(lora)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not logits(twin).any()
    assert torch.equal(logits(lora), before)
    twin.unload()
    assert torch.equal(logits(lora), before)


def test_a_second_trainer_puts_nothing_around_the_first_ones() -> None:
    lora = adapter_model()
    for _ in range(3):
        prepared(lora)
        assert layers_around(lora) == ["forward", "decorate_autocast"]
    assert "_original_forward" not in pickle.loads(pickle.dumps(lora)).__dict__


def test_unwrapping_takes_mixed_precision_off() -> None:
    lora = adapter_model()
    before = logits(lora)
    accelerator = prepared(lora)
    assert not torch.equal(logits(lora), before)
    assert accelerator.unwrap_model(lora) is lora
    assert accelerator.unwrap_model(lora, keep_fp32_wrapper=False) is lora
    assert layers_around(lora) == []
    assert torch.equal(logits(lora), before)


def test_other_replacements_stay_on_the_wrapper_and_out_of_copies() -> None:
    lora = adapter_model()
    before = logits(lora)
    inner, own = lora.forward, lora.model.forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert self is lora.model  # a method of the wrapper's is one of the model
        out = inner(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    lora.forward = MethodType(doubled, lora)
    assert torch.equal(logits(lora), 2 * before)
    assert lora.model.forward == own
    for how in COPIES.values():
        assert torch.equal(logits(how(lora)), before)
    lora.forward = lambda **kwargs: inner(**kwargs)
    assert torch.equal(logits(lora), before)
    del lora.forward
    assert torch.equal(logits(lora), before)


def test_what_reaches_the_model_inside_is_taken_off() -> None:
    """A trainer that takes the wrapper for PEFT's gives ``get_base_model()`` its forward, and its parts."""
    kept = llama()
    own = MethodType(type(kept.model.norm).forward, kept.model.norm)
    kept.model.norm.forward = own
    lora = apply_lora(kept, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    before = logits(lora)
    base = lora.get_base_model()
    original = base.forward

    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = 2 * out.logits
        return out

    base.forward = MethodType(twice, base)
    base.lm_head.forward = MethodType(nn.Linear.forward, base.lm_head)
    lora.enable_input_require_grads()
    lora.model.activation_checkpointing_enable()
    twin = copy.deepcopy(lora)
    assert torch.equal(logits(twin), before)
    assert torch.equal(logits(lora), 2 * before)
    unloaded = lora.unload()
    assert unloaded is kept
    assert [path for path, m in unloaded.named_modules() if "forward" in vars(m)] == ["model.norm"]
    assert unloaded.model.norm.forward == own
    assert not unloaded.is_activation_checkpointing
    assert not unloaded.model.embed_tokens._forward_hooks


def test_a_prepared_models_checkpointing_leaves_with_the_preparation() -> None:
    lora = apply_lora(prepare_model_for_kbit_training(llama()), LoraConfig(r=4, target_modules=["q_proj"]))
    lora.enable_input_require_grads()
    base = lora.unload()
    assert not base.is_activation_checkpointing
    assert not base.model.embed_tokens._forward_hooks


def test_a_codecs_own_forward_stays() -> None:
    """Rows that aren't a whole number of blocks are computed by look-up, with and without adapters."""
    model = nn.Sequential(nn.Linear(96, 64, bias=False))
    quantize_(model)
    lora = apply_lora(model, LoraConfig(r=4, target_modules=["0"]))
    assert "forward" in vars(lora.model[0].base_layer)
    assert "forward" in vars(copy.deepcopy(lora).model[0].base_layer)
    assert "forward" in vars(lora.unload()[0])


@pytest.mark.slow
def test_training_twice_in_mixed_precision_with_evaluation(tmp_path: Path) -> None:
    lora = adapter_model()
    for again in ("first", "second"):
        run = trained(lora, tmp_path / again, bf16=True, eval_strategy="steps", eval_steps=1, **LAST_STEPS)
        assert "eval_loss" in run.trainer.evaluate()
        assert layers_around(lora) == ["forward", "decorate_autocast"]
    assert logits(lora).shape[-1] == VOCABULARY
    base = lora.unload()
    assert torch.equal(logits(base), logits(llama()))
