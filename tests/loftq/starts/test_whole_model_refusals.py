"""Calibrated starts that warn, fail or are refused: what is said, and that the model is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import Routed, seeded, tiny_llama, tokens, vectors
from torch import nn

from loftq import register_method, start_report
from loftq.methods import registry as methods
from qlora_kit import LoftQConfig, LoraConfig, apply_lora
from qlora_kit.errors import AdapterError, ConfigError


def config(method: str, calibration: Any, *, target_modules: Any = "all-linear", **options: Any) -> LoraConfig:
    loftq = LoftQConfig(method=method, calibration=calibration, **options)
    return LoraConfig(r=2, target_modules=target_modules, init_lora_weights="loftq", loftq_config=loftq)


def texts() -> list[dict[str, Any]]:
    return [{**batch, "use_cache": False} for batch in tokens(8)]


def state(model: nn.Module) -> list[Any]:
    return [
        {name: id(module) for name, module in model.named_modules()},
        [module.training for module in model.modules()],
        [(vars(m).get("forward"), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [(name, id(p), p.requires_grad, p.detach().clone().tolist()) for name, p in model.named_parameters()],
    ]


@pytest.fixture
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_registry", "_needs"):
        monkeypatch.setattr(methods, name, dict(getattr(methods, name)))


@pytest.mark.usefixtures("_registry")
@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("number", [1, 4, 9])
@pytest.mark.slow
def test_a_start_that_fails_leaves_the_model_as_it_was(number: int, sequential: bool) -> None:
    calls = []

    @register_method("failing", statistics="full", sequential=sequential)
    def failing(problem: methods.Problem) -> methods.LoftQResult:
        calls.append(0)
        if len(calls) == number:
            raise ConfigError("no more")
        return methods.method_for("qera")(problem)

    model = tiny_llama().train()
    before = state(model)
    with pytest.raises(ConfigError, match=r"^model\.layers\.[01]\.\w+\.\w+: no more"):
        apply_lora(model, config("failing", texts()))
    assert state(model) == before
    # And the same model can be started afterwards.
    assert start_report(apply_lora(model, config("qera", texts()))).layers


def test_inputs_that_are_not_finite_are_an_error_that_names_the_module() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] = float("inf")
    before = state(model)[:3]
    message = r"^model\.layers\.0\.self_attn\.[qkv]_proj: expected finite inputs from the calibration text, found NaN"
    with pytest.raises(ConfigError, match=message):
        apply_lora(model, config("qera", texts()))
    assert state(model)[:3] == before


def test_too_little_text_is_warned_of() -> None:
    few = [{"input_ids": torch.arange(1, 13)[None], "use_cache": False}]
    message = (
        r"calibration: expected at least as many tokens as a layer has inputs, found 12 for the 24 of "
        r"model\.layers\.0\.mlp\.down_proj \(14 of 14 layers\): their second moments are rank-deficient, and damping"
    )
    with pytest.warns(UserWarning, match=message):
        lora = apply_lora(tiny_llama(), config("qera", few))
    assert all(row.tokens == 12 for row in start_report(lora).layers)


def test_modules_that_no_text_reaches_start_as_loftq_does_and_are_warned_of() -> None:
    targets = [f"layers.{layer}.experts.{k}" for layer in (0, 1) for k in range(4)]
    options = {"target_modules": targets, "loftq_bits": 2}
    message = (
        r"calibration: expected text that reaches every targeted module, found none of it at layers\.0\.experts\.3 "
        r"\(2 of 8\); they start as with method 'loftq'; calibrate on more text, or leave out"
    )
    with pytest.warns(UserWarning, match=message):
        lora = apply_lora(seeded(Routed), config("qera", vectors(20), **options))
    plain = apply_lora(seeded(Routed), config("loftq", None, **options))
    rows = {row.path: row for row in start_report(lora).layers}
    for layer in (0, 1):
        path = f"layers.{layer}.experts.3"
        assert (rows[path].tokens, rows[path].output_error) == (None, None)
        own, other = lora.adapter_layers()[path], plain.adapter_layers()[path]
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in own.state_dict().items())


def test_a_second_adapter_that_would_requantize_is_refused() -> None:
    lora = apply_lora(tiny_llama(), config("qera", texts()), "one")
    before = {key: value.clone() for key, value in lora.state_dict().items()}
    with pytest.raises(ConfigError, match=r"loftq_config.weights: expected the folder with the 16-bit safetensors"):
        lora.add_adapter("two", config("cloq", texts()))
    assert all(torch.equal(value, before[key]) for key, value in lora.state_dict().items())
    assert list(lora.peft_config) == ["one"]


def test_on_a_dense_model_with_an_adapter_the_start_is_refused() -> None:
    model = tiny_llama()
    lora = apply_lora(model, LoraConfig(r=2, target_modules="all-linear"), "one")
    before = state(model)
    with pytest.raises(AdapterError, match=r"would requantize the weight under the adapter\(s\) \['one'\]; start this"):
        lora.add_adapter("two", config("qera", texts()))
    assert state(model) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "qerra"}, r"method: expected one of .*'aligned'.*found 'qerra'; the closest are \['qera'"),
        ({"method": 3}, r"method.*the name of a method.*3"),
        ({"damping": 0.0}, r"damping.*0\.0"),
        ({"damping": -1.0}, r"damping.*-1\.0"),
        ({"calibration_rows": 0}, r"calibration_rows.*0"),
        ({"calibration_tokens": 2.5}, r"calibration_tokens.*2\.5"),
        ({"scale_search": "yes"}, r"scale_search.*'yes'"),
        ({"calibration": 7}, r"calibration: expected 'builtin', a text file, .* found int"),
        ({"calibration": []}, r"calibration: expected at least one batch"),
        ({"calibration": torch.zeros(3)}, r"calibration: expected token ids of shape"),
    ],
    ids=lambda value: "",
)
def test_options_that_can_t_be_are_refused_and_change_nothing(options: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    before = state(model)

    def start() -> None:
        apply_lora(model, config(**{"method": "qera", "calibration": texts(), **options}))

    with pytest.raises(ConfigError, match=message):
        start()
    assert state(model) == before
