"""The names of ``qlora_kit.compat.peft``: what they are, and the errors of their users."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_mlp import mlp, wrapped
from torch import nn

import qlora_kit
from qlora_kit.compat import peft as names
from qlora_kit.compat.peft import (
    LoraConfig,
    LoraLayer,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    PeftWarning,
    TaskType,
    get_peft_config,
    get_peft_model,
)
from qlora_kit.errors import AdapterError, ConfigError, TargetError

PROMISED = [
    "LoraConfig",
    "LoftQConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForSequenceClassification",
    "PeftModelForSeq2SeqLM",
    "PeftModelForTokenClassification",
    "PeftModelForQuestionAnswering",
    "PeftModelForFeatureExtraction",
    "PeftMixedModel",
    "AutoPeftModelForCausalLM",
    "get_peft_model",
    "inject_adapter_in_model",
    "get_peft_model_state_dict",
    "set_peft_model_state_dict",
    "get_layer_status",
    "get_model_status",
    "prepare_model_for_kbit_training",
    "prepare_model_for_int8_training",
    "LoraModel",
    "LoraLayer",
]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


def test_every_promised_name_is_there() -> None:
    assert set(PROMISED) <= set(names.__all__)
    assert all(hasattr(names, name) for name in names.__all__)


def test_they_are_the_toolkits_own_objects() -> None:
    assert names.LoraModel is qlora_kit.LoraModel
    assert names.LoftQConfig is qlora_kit.LoftQConfig
    assert LoraLayer is qlora_kit.AdapterLayer
    assert names.prepare_model_for_kbit_training is qlora_kit.prepare_model_for_kbit_training
    model = wrapped()
    assert isinstance(model, qlora_kit.LoraModel)
    assert isinstance(model.model[0], LoraLayer)
    assert isinstance(model.peft_config["default"], qlora_kit.LoraConfig)


# -- signatures ------------------------------------------------------------------------------------------

# What is left out on purpose, with the reason.
LEFT_OUT = {
    ("prepare_model_for_kbit_training", "auto_clear_cache"),  # nothing is left in the cache to clear
    ("PeftModel.from_pretrained", "key_mapping"),  # for models that transformers renamed; refused by name
    ("PeftModel.load_adapter", "key_mapping"),
    ("PeftModel.from_pretrained", "ephemeral_gpu_offload"),  # taken through **kwargs, as is that below
    ("PeftModel.load_adapter", "ephemeral_gpu_offload"),
    ("PeftModel.load_adapter", "low_cpu_mem_usage"),
}


@pytest.mark.parametrize(
    "path",
    [
        "get_peft_model",
        "inject_adapter_in_model",
        "get_peft_model_state_dict",
        "set_peft_model_state_dict",
        "get_layer_status",
        "get_model_status",
        "prepare_model_for_kbit_training",
        *(
            f"PeftModel.{method}"
            for method in [
                "__init__",
                "from_pretrained",
                "save_pretrained",
                "load_adapter",
                "add_adapter",
                "delete_adapter",
                "set_adapter",
                "set_requires_grad",
                "disable_adapter",
                "get_base_model",
                "get_nb_trainable_parameters",
                "get_layer_status",
                "get_model_status",
                "print_trainable_parameters",
            ]
        ),
        *(
            f"LoraModel.{method}"
            for method in [
                "merge_and_unload",
                "unload",
                "merge_adapter",
                "unmerge_adapter",
                "disable_adapter_layers",
                "enable_adapter_layers",
            ]
        ),
    ],
)
def test_calls_written_for_peft_fit(path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft", reason="the peer whose signatures these are isn't installed")
    ours, theirs = (parameters_of(module, path) for module in (names, peft))
    expected = [name for name in theirs if (path, name) not in LEFT_OUT and name not in ("self", "kwargs")]
    assert [name for name in expected if name not in ours] == []
    in_both = [name for name in ours if name in expected]
    assert in_both == expected, "positional arguments have PEFT's order"


def parameters_of(module: Any, path: str) -> list[str]:
    found = module
    for name in path.split("."):
        found = getattr(found, name)
    return list(inspect.signature(found).parameters)


# -- configurations ----------------------------------------------------------------------------------------


def test_enumerations_equal_their_names() -> None:
    config = LoraConfig(task_type=TaskType.SEQ_CLS, peft_type=PeftType.LORA)
    assert config.task_type == TaskType.SEQ_CLS == "SEQ_CLS"
    assert config.peft_type == PeftType.LORA == "LORA"
    assert json.loads(json.dumps(config.to_dict()))["task_type"] == "SEQ_CLS"


def test_peft_config_is_a_base_of_every_kind_and_reads_it(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=["q"], task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    read = PeftConfig.from_pretrained(tmp_path)
    assert read == config == get_peft_config(config.to_dict())
    assert isinstance(read, PeftConfig)
    assert isinstance(qlora_kit.LoraConfig(), PeftConfig)


def test_peft_arguments_at_their_defaults_are_taken_and_others_refused() -> None:
    assert LoraConfig(r=2, use_dora=False, lora_bias=False, layer_replication=None) == LoraConfig(r=2)
    with pytest.raises(ConfigError, match=r"use_dora: expected False, found True; .* leave it out"):
        LoraConfig(use_dora=True)
    with pytest.raises(TypeError, match="lora_rank"):
        LoraConfig(lora_rank=8)


# -- models --------------------------------------------------------------------------------------------------


def test_a_wrapped_model_is_an_instance_of_both_kinds(llama: nn.Module) -> None:
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj"])
    model = get_peft_model(copy.deepcopy(llama), config)
    assert type(model) is PeftModelForCausalLM
    assert isinstance(model, PeftModel)
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert isinstance(model.base_model.model, transformers.LlamaForCausalLM)
    assert model.base_model.model is model.get_base_model()
    assert list(inspect.signature(model.forward).parameters) == list(inspect.signature(llama.forward).parameters)


def test_mixed_takes_several_active_adapters() -> None:
    model = get_peft_model(mlp(), LoraConfig(target_modules=["0"]), mixed=True)
    assert type(model) is PeftMixedModel
    model.add_adapter("other", LoraConfig(target_modules=["2"]))
    model.set_adapter(["default", "other"])
    assert model.active_adapters == ["default", "other"]
    assert model.active_peft_config is model.peft_config["default"]


def test_adapters_of_half_precision_models_are_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    config = LoraConfig(target_modules=["0"])
    model = get_peft_model(mlp().bfloat16(), config)
    assert model.model[0].lora_A["default"].weight.dtype == torch.float32
    kept = get_peft_model(mlp().bfloat16(), config, autocast_adapter_dtype=False)
    assert kept.model[0].lora_A["default"].weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(mlp().bfloat16(), tmp_path, autocast_adapter_dtype=False)
    assert loaded.model[0].lora_A["default"].weight.dtype == torch.bfloat16


def test_the_revision_is_recorded_and_the_callers_config_left_alone() -> None:
    config = LoraConfig(target_modules=["0"])
    assert get_peft_model(mlp(), config, revision="v2").peft_config["default"].revision == "v2"
    assert config == LoraConfig(target_modules=["0"])


def test_a_model_that_is_wrapped_already_gets_a_new_adapter_with_a_warning() -> None:
    first = wrapped()
    with pytest.warns(PeftWarning, match=r"has adapters already, .* unload\(\) it first"):
        second = get_peft_model(first, LoraConfig(r=4, target_modules=["0"]))
    assert second.model is first.model
    assert second.model[0].r == {"default": 4}
    assert type(second.model[2]) is nn.Linear


def test_a_cell_that_is_run_twice_starts_over_with_a_warning() -> None:
    base = mlp()
    get_peft_model(base, LoraConfig(target_modules=["0"]), "other")
    first = get_peft_model_warned(base, LoraConfig(target_modules=["0"]))
    weight = first.model[0].lora_A["default"].weight
    second = get_peft_model_warned(base, LoraConfig(target_modules=["0"]))
    assert second.model[0].lora_A["default"].weight is not weight
    assert sorted(second.model[0].r) == ["default", "other"]


def test_a_second_wrapping_that_fails_leaves_the_first_adapter() -> None:
    base = mlp()
    first = get_peft_model(base, LoraConfig(target_modules=["0"]))
    weight = first.model[0].lora_A["default"].weight
    with pytest.warns(PeftWarning), pytest.raises(TargetError, match="nowhere"):
        get_peft_model(base, LoraConfig(target_modules=["nowhere"]))
    assert first.model[0].lora_A["default"].weight is weight


def get_peft_model_warned(base: nn.Module, config: LoraConfig) -> PeftModel:
    with pytest.warns(PeftWarning):
        return get_peft_model(base, config)


def test_set_requires_grad_leaves_the_active_adapter() -> None:
    model = wrapped()
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad(["default"])
    assert model.model[0].lora_A["default"].weight.requires_grad
    assert model.active_adapters == ["default"]
    with pytest.raises(AdapterError, match=r"unknown adapter 'nobody'; the model has \['default'\]"):
        model.set_requires_grad("nobody")
