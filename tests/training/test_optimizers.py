"""LoRA+, LoRA-FA and optimizers by name: each step against a float64 reference, groups against peft's."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from reference.branches import array
from reference.optimizers import AdamW, nearest_step
from tiny_llama import batch, llama
from torch import nn

import qlora_kit.compat.peft.optimizers as compat
from qlora_kit import AdapterError, ConfigError, LoraConfig, LoraModel, apply_lora
from qlora_kit.training.optimizers import lora_fa_, lora_plus, lora_plus_groups, optimizer, optimizer_class
from qlora_kit.training.optimizers.named import NAMES

pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft reads it
]
WIDE = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["lm_head", "model.norm"]}


def adapted(**settings: Any) -> LoraModel:
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    return apply_lora(llama(attention_bias=True), LoraConfig(**{**chosen, **settings})).double()


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def backward(model: nn.Module) -> None:
    model.zero_grad()
    model(**batch()).loss.backward()


# -- LoRA+ -----------------------------------------------------------------------------------------------------


def test_each_factor_steps_at_its_rate() -> None:
    model = adapted()
    made = lora_plus(model, lr=1e-3, ratio=8.0, weight_decay=0.1)
    references = {name: AdamW(1e-3 * (8 if "lora_B" in name else 1), 0.1) for name in factors(model)}
    expected = {name: array(p) for name, p in factors(model).items()}
    for _ in range(3):
        backward(model)
        for name, parameter in factors(model).items():
            expected[name] = references[name].step(expected[name], array(parameter.grad))
        made.step()
    for name, parameter in factors(model).items():
        assert abs(array(parameter) - expected[name]).max() < 1e-12, name


def test_groups_are_those_of_peft() -> None:
    """By names, rates and decay; peft's own model and function on the same base."""
    settings = {"r": 4, "bias": "lora_only", **WIDE}
    ours = apply_lora(llama(attention_bias=True), LoraConfig(**settings))
    theirs = peft.get_peft_model(llama(attention_bias=True), peft.LoraConfig(**settings))
    rates = {"lr": 1e-3, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    expected = grouped(theirs, create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates))
    found = grouped(ours, compat.create_loraplus_optimizer(ours, torch.optim.AdamW, **rates))
    # peft says of a norm, which is in no list of its, that it decays; vectors don't here.
    for name in [name for name in expected if "norm" in name]:
        assert expected.pop(name) == (4e-3, 0.1)
        assert found.pop(name) == (4e-3, 0.0)
    assert found == expected
    assert {rate for rate, _ in found.values()} == {1e-3, 4e-3, 1e-5}


def grouped(model: nn.Module, made: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    names = {id(p): plain(name) for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"]}


def plain(name: str) -> str:
    """A parameter's name in the base: of ours and peft's wrapper alike."""
    return name.removeprefix("base_model.model." if name.startswith("base_model.") else "model.")


def test_all_that_is_trained_is_in_one_group() -> None:
    model = adapted(bias="all", **{**WIDE, "modules_to_save": ["lm_head"]})
    groups = lora_plus_groups(model, lr=1e-3)
    found = [id(p) for group in groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in factors(model).values())
    assert [group["name"] for group in groups] == ["A", "tables", "B", "vectors"]
    assert [group["name"] for group in lora_plus_groups(adapted(), lr=1e-3)] == ["A", "B"]


def test_tied_tables_are_once_there() -> None:
    tied = LoraConfig(target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True)
    model = apply_lora(llama(tied=True), tied)
    sizes = {group["name"]: len(group["params"]) for group in lora_plus_groups(model, lr=1e-3)}
    assert sizes == {"A": 2, "tables": 2, "B": 2}


# -- LoRA-FA ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_steps_along_what_is_nearest_to_the_full_gradient(use_rslora: bool) -> None:
    model = adapted(use_rslora=use_rslora, rank_pattern={"down_proj": 8})
    layer = model.model.model.layers[0].mlp.down_proj
    layer.base_layer.weight.requires_grad_(True)  # so that the gradient by the whole weight is there
    made = lora_fa_(model, lr=1e-2, weight_decay=0.1)
    layer.base_layer.weight.requires_grad_(False)
    made = lora_fa_(model, lr=1e-2, weight_decay=0.1)
    layer.base_layer.weight.requires_grad_(True)
    A, B = layer.factors("default")
    start, expected, reference = array(A), array(B), AdamW(1e-2, 0.1)
    for _ in range(3):
        backward(model)
        kept = B.grad.clone()
        scaling = layer.scaling["default"]
        whole = nearest_step(array(A), array(layer.base_layer.weight.grad), scaling)
        expected = reference.step(expected, whole)
        made.step()
        assert torch.equal(B.grad, kept)  # as backward left it
    assert abs(array(B) - expected).max() < 1e-6  # the inverse is kept in float32
    assert (array(A) == start).all()
    assert layer.lora_A["default"].weight.grad is None


def test_a_is_frozen_and_has_no_state() -> None:
    model = adapted(modules_to_save=["lm_head"])
    made = lora_fa_(model, lr=1e-3)
    assert {name.split(".")[-3] for name in factors(model)} == {"lora_B", "modules_to_save"}
    backward(model)
    made.step()
    assert len(made.state) == len(factors(model))


def test_it_steps_along_what_peft_steps_along() -> None:
    """The first moments, to what is left of peft's product in bfloat16; its AdamW has its epsilon at another place."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    ours = apply_lora(llama(), LoraConfig(**settings))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**settings))
    state = {plain(name): p for name, p in theirs.named_parameters()}
    with torch.no_grad():
        for name, parameter in factors(ours).items():
            parameter.copy_(state[plain(name)])
    first = compat.create_lorafa_optimizer(ours, r=4, lora_alpha=8, lr=1e-3)
    second = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-3)
    for model, made in ((ours, first), (theirs, second)):
        backward(model)
        made.step()
    assert len(factors(ours)) == 4
    for name, parameter in factors(ours).items():
        expected = second.state[f"base_model.model.{plain(name).partition('lora_')[0]}lora"]["exp_avg_B"]
        assert (first.state[parameter]["exp_avg"] - expected).norm() < 0.01 * expected.norm()


def test_an_adapter_with_a_dead_row_still_steps() -> None:
    model = adapted()
    with torch.no_grad():
        model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight[0] = 0
    made = lora_fa_(model, lr=1e-2)
    backward(model)
    made.step()
    assert all(torch.isfinite(p).all() for p in factors(model).values())


def test_a_closure_is_refused() -> None:
    model = adapted()
    made = lora_fa_(model, lr=1e-2)
    with pytest.raises(ConfigError, match=r"step\(closure\): expected gradients that are there before the step"):
        made.step(lambda: 0.0)


def test_an_error_leaves_a_trainable() -> None:
    model = adapted()
    before = set(factors(model))
    with pytest.raises(ConfigError, match=r"optimizer: expected one of \d+ names, found 'adamw_8bits'; closest"):
        lora_fa_(model, "adamw_8bits", lr=1e-2)
    assert set(factors(model)) == before


# -- by name ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("adamw", "AdamW", {}),
        ("adamw_8bit", "AdamW8bit", {}),
        ("paged_adamw_8bit", "PagedAdamW8bit", {}),
        ("paged_adamw_32bit", "PagedAdamW32bit", {}),
        ("lion_8bit", "Lion8bit", {}),
        ("paged_lion_8bit", "PagedLion8bit", {}),
        ("ademamix_8bit", "AdEMAMix8bit", {}),
        ("ademamix_32bit", "AdEMAMix", {}),
        ("paged_ademamix_32bit", "PagedAdEMAMix", {}),
        ("sgd_8bit", "SGD8bit", {"momentum": 0.9}),
        ("rmsprop_8bit", "RMSprop8bit", {}),
    ],
)
def test_names(name: str, kind: str, settings: dict[str, Any]) -> None:
    model = apply_lora(llama(), LoraConfig(r=4, target_modules="all-linear"))
    made = optimizer(name, model, lr=1e-3, weight_decay=0.1, **settings)
    assert type(made).__name__ == kind
    assert optimizer_class(name) is type(made)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        loss.backward()
        made.step()
        made.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_name_steps(name: str) -> None:
    p = nn.Parameter(torch.ones(80, 64))
    model = nn.ParameterList([p])
    momentum = {"momentum": 0.9} if name.startswith(("sgd", "lars")) else {}
    made = optimizer(name, model, lr=1e-2, **momentum)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        made.step()
    assert (p < 1).all()


def test_bitsandbytes_ademamix_of_32_bits_lacks_a_state() -> None:
    """Why another class of it is taken; where this fails its own name can be."""
    p = nn.Parameter(torch.ones(8, 4))
    made = bnb.optim.AdEMAMix32bit([p])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        made.step()


@pytest.mark.parametrize("name", ["sgd_8bit", "lars_32bit"])
def test_momentum_is_asked_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"momentum: expected a number above 0 \(.*bit\), found None; pass momentum="):
        optimizer(name, adapted(), lr=1e-3)


def test_eight_bits_are_eight_bits_but_for_tables() -> None:
    whole = ["embed_tokens", "lm_head"]
    model = apply_lora(llama(), LoraConfig(r=64, target_modules=["q_proj"], modules_to_save=whole))
    made = optimizer("adamw_8bit", model, lr=1e-3)
    model(**batch()).loss.backward()
    made.step()
    bits = {name: made.state[p]["state1"].dtype for name, p in factors(model).items()}
    table = [dtype for name, dtype in bits.items() if "embed_tokens" in name]
    rest = {dtype for name, dtype in bits.items() if "embed_tokens" not in name}
    assert table == [torch.float32]
    assert rest == {torch.uint8}


def test_vectors_dont_decay() -> None:
    model = adapted(bias="all")
    made = optimizer("adamw", model, lr=1e-3, weight_decay=0.1)
    decay = {p.dim(): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    assert decay == {2: 0.1, 1: 0.0}


# -- refused ---------------------------------------------------------------------------------------------------


def test_nothing_to_train_is_refused() -> None:
    frozen = llama().requires_grad_(False)
    for make in (lora_plus, lora_fa_):
        with pytest.raises(AdapterError, match="expected parameters that require a gradient, found none"):
            make(frozen, lr=1e-3)
    with pytest.raises(AdapterError, match="expected a trained adapter, found none"):
        lora_fa_(llama(), lr=1e-3)


@pytest.mark.parametrize("field", ["lr", "ratio", "lr_embedding"])
def test_rates_are_positive(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: expected a finite number above 0, found -1"):
        lora_plus(adapted(), **{"lr": 1e-3, field: -1})


def test_pefts_use_rslora_has_to_be_true() -> None:
    model = adapted()
    with pytest.raises(ConfigError, match="use_rslora: expected what the active adapters were made with, found True"):
        compat.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-3, use_rslora=True)
    with pytest.warns(FutureWarning, match="use_rslora is read from the adapters' configurations"):
        compat.create_lorafa_optimizer(model, r=4, lora_alpha=6, lr=1e-3, use_rslora=False)
