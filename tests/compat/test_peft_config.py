"""``LoraConfig`` of ``qlora_kit.compat.peft``: every field that PEFT's has, read, written, and refused where it asks
for what isn't here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mlp import mlp, wrapped

from qlora_kit.compat.peft import (
    LoraConfig,
    LoraLayer,
    LoraRuntimeConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    TaskType,
    get_peft_model,
)
from qlora_kit.errors import ConfigError


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="the peer whose fields these are isn't installed")


def test_every_field_is_read_at_pefts_default(peft: Any) -> None:
    ours, theirs = LoraConfig(), peft.LoraConfig()
    for field in dataclasses.fields(theirs):
        if field.name not in ("runtime_config", "peft_version"):
            assert getattr(ours, field.name) == getattr(theirs, field.name), field.name
    assert ours.runtime_config == LoraRuntimeConfig(ephemeral_gpu_offload=False)
    assert (ours.is_prompt_learning, ours.is_adaption_prompt) == (False, False)
    assert ours.peft_version


def test_the_signature_has_every_field(peft: Any) -> None:
    ours, theirs = (inspect.signature(kind).parameters for kind in (LoraConfig, peft.LoraConfig))
    assert set(theirs) <= set(ours)
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in ours.values())


def test_a_file_has_the_fields_of_pefts_and_both_read_it(tmp_path: Path, peft: Any) -> None:
    config = LoraConfig(r=3, target_modules=["q", "k"], exclude_modules=["a.q"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path / "ours")
    theirs = peft.LoraConfig(r=3, target_modules=["q", "k"], exclude_modules=["a.q"], task_type="CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    written = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for one in written:
        del one["peft_version"]
        one["target_modules"] = sorted(one["target_modules"])
    assert written[0] == written[1]
    assert peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict() == theirs.to_dict()
    assert PeftConfig.from_pretrained(tmp_path / "theirs") == config


def test_types_are_enumerations_and_lists_of_names_sets() -> None:
    config = LoraConfig(target_modules=["k", "q"], exclude_modules=["v"], task_type="SEQ_CLS")
    assert config.target_modules == {"k", "q"}
    assert config.exclude_modules == {"v"}
    assert (config.peft_type, config.task_type) == (PeftType.LORA, TaskType.SEQ_CLS)
    assert (config.peft_type.value, config.task_type.value) == ("LORA", "SEQ_CLS")
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("target_parameters", ["experts.down_proj"]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("eva_config", {"rho": 2.0}),
        ("corda_config", {}),
        ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"scale": "stable"}),
        ("arrow_config", {"top_k": 2}),
        ("alora_invocation_tokens", [1, 2]),
    ],
)
def test_a_field_that_asks_for_something_is_refused_by_name(name: str, value: Any) -> None:
    if not value:
        assert getattr(LoraConfig(**{name: value}), name) is None
        return
    with pytest.raises(ConfigError, match=rf"{name}: expected (None|False), found .*isn't implemented here"):
        LoraConfig(**{name: value})


def test_a_refusal_says_what_there_is_instead() -> None:
    for name, value, instead in [
        ("use_dora", True, "use_rslora"),
        ("target_parameters", ["experts.down_proj"], "target_modules"),
        ("trainable_token_indices", [1], "modules_to_save"),
        ("layer_replication", [[0, 2]], "plain LoRA"),
    ]:
        with pytest.raises(ConfigError, match=rf"{name}: .* isn't implemented here \(.*{instead}.*\): leave it out"):
            LoraConfig(**{name: value})


def test_what_says_nothing_is_taken() -> None:
    assert LoraConfig(target_parameters=None, qalora_group_size=32, layers_pattern=[]).layers_pattern is None
    with pytest.raises(ConfigError, match="ephemeral_gpu_offload: expected False, found True"):
        LoraRuntimeConfig(ephemeral_gpu_offload=True)


def test_readers_of_pefts_base_class(tmp_path: Path) -> None:
    config = LoraConfig(r=5, target_modules=["0"])
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "A", "parent_library": "b"})
    fields = LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert (fields["r"], fields["auto_mapping"]) == (5, {"base_model_class": "A", "parent_library": "b"})
    assert config.auto_mapping is None
    assert PeftConfig.from_peft_type(peft_type="LORA", r=5, target_modules=["0"]) == config
    assert PeftConfig.check_kwargs(r=5) == {"r": 5}
    assert isinstance(config, PeftConfig)
    with pytest.raises(TypeError, match="push_to_hu"):
        config.save_pretrained(tmp_path, push_to_hu=True)


def test_a_configuration_given_for_loading_is_kept_and_brought_up_to_date(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.5)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    assert (config.inference_mode, config.lora_dropout) == (True, 0.5)
    assert isinstance(loaded.model[0].lora_dropout["default"], torch.nn.Dropout)


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classifier = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.tanh(self.body(x)))


def test_the_head_of_a_task_is_loaded_though_the_configuration_given_does_not_name_it(tmp_path: Path) -> None:
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["body"])
    model, x = get_peft_model(Classifier(), config), torch.randn(4, 6)
    torch.nn.init.normal_(model.model.classifier.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    assert config.modules_to_save is None
    base = Classifier()
    base.body.load_state_dict(model.model.body.base_layer.state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path, config=config)
    torch.testing.assert_close(loaded(x), model.eval()(x), rtol=0, atol=0)
    assert config.modules_to_save == ["classifier"]


def test_a_head_that_only_has_a_branch_is_not_trained_whole(tmp_path: Path) -> None:
    get_peft_model(Classifier(), LoraConfig(r=2, target_modules=["classifier"])).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        Classifier(), tmp_path, config=LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["classifier"])
    )
    assert isinstance(loaded.model.classifier, LoraLayer)
    assert loaded.peft_config["default"].modules_to_save is None


def test_sets_of_targets_train_save_and_combine(tmp_path: Path) -> None:
    model = wrapped(init_lora_weights=False)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["2"]))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", "cat")
    assert model.peft_config["both"].target_modules == {"0", "2"}
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert stored["target_modules"] == ["0", "2"]
