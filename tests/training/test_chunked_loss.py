"""``use_chunked_loss`` on models of transformers: their own loss and gradients, and nothing else about them changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpointing import enable_checkpointing
from reference.branches import array
from reference.cross_entropy import next_words, scored
from tiny_llama import STORAGES, adapted, batch, llama, load
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from zoo import QUICK, ZOO

from qlora_kit import AdapterError, LoraConfig, apply_lora
from qlora_kit.training import use_chunked_loss
from qlora_kit.training.deferred_logits import DeferredLogits

CHUNK = 5


def masked_batch() -> dict[str, Tensor]:
    found = batch()
    found["labels"] = found["labels"].clone()
    found["labels"][0, :4] = -100
    return found


def gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(
    model: nn.Module, inputs: dict[str, Any], tolerance: float, tried: dict[str, Any] | None = None
) -> None:
    """Loss and all gradients with chunks are those without; what is zero but for rounding counts beside the others."""
    expected_loss, expected = gradients(model, inputs)
    least = 1e-6 * max(value.norm() for value in expected.values())
    with use_chunked_loss(model, chunk=CHUNK, batch=tried):
        loss, found = gradients(model, inputs)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert found, "no gradients to compare"
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + least, name


# -- against the reference -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "traits"),
    [
        ("llama", {}),
        ("gemma2", {"cap": 4.0}),
        ("granite", {"scale": 1 / 8}),
        ("cohere", {"scale": 0.25}),
        ("phi", {}),  # its head has a bias
    ],
)
@pytest.mark.parametrize("counted", [None, 7])
@pytest.mark.slow
def test_a_models_loss_is_the_references(name: str, traits: dict[str, float], counted: int | None) -> None:
    """In float64: transformers' shift, ``ignore_index`` and ``num_items_in_batch``, and what the model does to
    logits."""
    model = ZOO[name].make().double()
    settings = {"final_logit_softcapping": 4.0, "logits_scaling": 8.0, "logit_scale": 0.25}
    for field, value in settings.items():
        for owner in (model, model.config):
            if getattr(owner, field, None) is not None:
                setattr(owner, field, value)
    use_chunked_loss(model, chunk=CHUNK)
    head, seen = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]) or args[0].retain_grad())
    inputs = ZOO[name].batch()
    inputs["labels"][0, :3] = -100
    loss = model(**inputs, **({} if counted is None else {"num_items_in_batch": torch.tensor(counted)})).loss
    loss.backward()
    (hidden,) = seen
    expected = scored(
        array(hidden.flatten(0, 1)),
        array(head.weight),
        next_words(inputs["labels"].numpy()),
        bias=None if head.bias is None else array(head.bias),
        divisor=counted,
        **traits,
    )
    # The loss is cast to float32 by transformers.
    assert loss.item() == pytest.approx(expected.loss, rel=1e-6)
    found = array(hidden.grad.flatten(0, 1))
    assert abs(found - expected.hidden).max() < 1e-6 * abs(expected.hidden).max()


# -- against the plain loss, whatever the model ----------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.zoo) for n in ZOO if ZOO[n].model_class]
)
def test_every_model_with_a_head_of_words(name: str) -> None:
    """The probe compares by itself, in any class; here the member's own batch, and all gradients."""
    model = ZOO[name].make()
    if not hasattr(type(model), "get_output_embeddings") or model.get_output_embeddings() is None:
        pytest.skip("no output embeddings")
    if name == "rwkv":  # its own backward, in evaluation mode, finds weights that it has rescaled in between
        use_chunked_loss(model, chunk=CHUNK)
    else:
        assert_same_training(model, ZOO[name].batch(), 1e-4, tried=ZOO[name].batch())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_every_storage(storage: str, dtype: torch.dtype, llama_dir: Path) -> None:
    lora = adapted(load(llama_dir, storage, dtype))
    for parameter in lora.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    # A half's gradients are rounded once more, and int8 layers multiply rounded activations.
    rounded = dtype is torch.bfloat16 or storage == "8-bit"
    assert_same_training(lora, masked_batch(), 0.02 if rounded else 1e-5)


TIED = {"ensure_weight_tying": True}


@pytest.mark.parametrize("few", [{"load_in_8bit": True}, {"load_in_4bit": True}])
@pytest.mark.parametrize("with_adapter", [True, False])
@pytest.mark.slow
def test_a_head_of_bitsandbytes(few: dict[str, bool], with_adapter: bool, llama_dir: Path) -> None:
    """As transformers loads it if it is told not to skip the head."""
    quantization = BitsAndBytesConfig(**few, llm_int8_skip_modules=["nothing"])
    model = LlamaForCausalLM.from_pretrained(llama_dir, dtype=torch.bfloat16, quantization_config=quantization)
    assert type(model.lm_head).__name__ in ("Linear8bitLt", "Linear4bit")
    targets = ["q_proj", "lm_head"] if with_adapter else ["q_proj"]
    assert_same_training(apply_lora(model, LoraConfig(target_modules=targets, init_lora_weights=False)), batch(), 0.03)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "an adapter": lambda: apply_lora(llama(), LoraConfig(target_modules=["q_proj", "lm_head"])),
    "trained whole": lambda: apply_lora(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "tied": lambda: adapted(llama(tied=True)),
    "tied, an adapter": lambda: apply_lora(llama(True), LoraConfig(target_modules=["embed_tokens", "lm_head"], **TIED)),
    "tied, trained whole": lambda: apply_lora(
        llama(True), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], **TIED)
    ),
    "all trained": lambda: llama(tied=True),
    "half, trained in float32": lambda: apply_lora(
        llama().bfloat16(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head: str) -> None:
    model = HEADS[head]()
    assert_same_training(model, masked_batch(), 0.02 if "half" in head else 1e-5)


def test_under_autocast() -> None:
    """A weight's cast, made where no gradient is wanted, must not be the one that gets the gradient."""
    model = apply_lora(llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**masked_batch()).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = run()
    with use_chunked_loss(model, chunk=CHUNK):
        found = run()
    assert any("lm_head" in name for name in expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 0.02 * value.norm(), name


def test_with_activation_checkpointing() -> None:
    model = adapted(llama())
    expected = gradients(model, masked_batch())[1]
    enable_checkpointing(model.model)
    model.train()
    with use_chunked_loss(model, chunk=CHUNK):
        found = gradients(model, masked_batch())[1]
    assert all(torch.allclose(found[name], value, rtol=1e-4, atol=1e-8) for name, value in expected.items())


# -- what doesn't change ---------------------------------------------------------------------------------------


def test_without_labels_nothing_differs() -> None:
    model = adapted(llama()).eval()
    ids = batch()["input_ids"]
    expected, words = model(input_ids=ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    use_chunked_loss(model, chunk=CHUNK)
    found = model(input_ids=ids).logits
    assert type(found) is Tensor
    assert torch.equal(found, expected)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), words)
    assert "forward" not in vars(model.model.lm_head)


def test_logits_are_there_for_who_looks() -> None:
    model = adapted(llama()).eval()
    expected = model(**batch()).logits
    use_chunked_loss(model, chunk=CHUNK)
    output = model(**batch())
    assert type(output.logits) is DeferredLogits
    assert output.logits.shape == expected.shape
    assert output.logits.dtype == expected.dtype
    assert output.logits.requires_grad
    assert torch.equal(output.logits, expected)
    assert torch.equal(output.logits[..., :-1, :].argmax(-1), expected[..., :-1, :].argmax(-1))
    for one, other in ((output.logits, model(**batch()).logits), (expected, expected.detach())):
        assert (F.softmax(one, -1) * other).sum().requires_grad


@pytest.mark.parametrize("change", ["step", "adapter", "mode"])
def test_logits_of_a_head_that_has_changed_are_an_error(change: str) -> None:
    model = apply_lora(llama(), LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    use_chunked_loss(model, chunk=CHUNK)
    if change == "adapter":
        with model.disable_adapter():
            output = model(**batch())
    else:
        output = model(**batch())
        if change == "mode":
            model.train(not model.training)
        else:
            torch.nn.init.ones_(model.model.lm_head.lora_B["default"].weight)
    with pytest.raises(AdapterError, match=r"logits: expected the head to be as it was.*use the logits right after"):
        output.logits.sum()


def test_copies_and_pickles_go_on() -> None:
    model = adapted(llama()).eval()
    expected = model(**batch()).loss
    use_chunked_loss(model, chunk=CHUNK)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = other(**batch())
        assert type(output.logits) is DeferredLogits
        assert torch.allclose(output.loss, expected)


def test_an_error_within_the_forward_leaves_the_head() -> None:
    model = llama()
    use_chunked_loss(model, chunk=CHUNK)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6), labels=torch.ones(1, 4, dtype=torch.long))
    assert "forward" not in vars(model.lm_head)


def test_activation_disturbs_nothing() -> None:
    model = adapted(llama()).train()
    gradients(model, batch())
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    state, training = torch.random.get_rng_state(), [m.training for m in model.modules()]
    use_chunked_loss(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == training
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)


# -- on, off, again --------------------------------------------------------------------------------------------


def deferred(model: nn.Module) -> bool:
    return isinstance(model(**batch()).logits, DeferredLogits)


def test_on_and_off() -> None:
    model = adapted(llama())
    used = use_chunked_loss(model, chunk=3)
    assert (used.chunk, used.module) == (3, model.model)
    assert use_chunked_loss(model, chunk=4).chunk == used.chunk == 4
    assert len(model.model._forward_pre_hooks) == len(model.model._forward_hooks) == 1
    assert deferred(model)
    used.remove()
    used.remove()
    assert used.chunk is None
    assert not deferred(model)
    with use_chunked_loss(model):
        assert deferred(model)
    assert not deferred(model)


def test_an_adapter_that_comes_later_is_seen() -> None:
    model = llama()
    use_chunked_loss(model, chunk=CHUNK)
    lora = apply_lora(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    loss, found = gradients(lora, batch())
    assert len(found) == 2
    use_chunked_loss(lora).remove()
    assert gradients(lora, batch())[0].item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_head_with_an_adapter_for_each_row_computes_as_ever() -> None:
    config = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = apply_lora(llama(), config, "a").eval()
    model.add_adapter("b", config)
    names = {"adapter_names": ["a", "b"]}
    expected = model(**batch(), **names)
    use_chunked_loss(model, chunk=CHUNK)
    found = model(**batch(), **names)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    assert type(found.logits) is Tensor
