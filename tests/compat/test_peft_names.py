"""The names of ``qlora_kit.compat.peft``: what they are, and the errors of their users."""

from __future__ import annotations

import copy
import inspect
import io
import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import qlora_kit
from qlora_kit.compat import peft as names
from qlora_kit.compat.peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    LoraLayer,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftType,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from qlora_kit.errors import AdapterError, ConfigError, StorageError

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


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def wrapped(**fields: Any) -> PeftModel:
    return get_peft_model(mlp(), LoraConfig(r=2, target_modules=["0", "2"], **fields))


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


def test_importing_them_imports_neither_peft_nor_transformers() -> None:
    code = "import sys, qlora_kit.compat.peft; print({'peft', 'transformers', 'bitsandbytes'} & set(sys.modules) or '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


# -- signatures ------------------------------------------------------------------------------------------

# What is left out on purpose, with the reason.
LEFT_OUT = {
    ("prepare_model_for_kbit_training", "auto_clear_cache"),  # nothing is left in the cache to clear
    ("inject_adapter_in_model", "state_dict"),  # targets guessed from a file's keys; adapter_config.json has them
    ("PeftModel.from_pretrained", "ephemeral_gpu_offload"),  # through **kwargs, as are the two below
    ("PeftModel.from_pretrained", "key_mapping"),  # for models that transformers renamed; refused by name
    ("PeftModel.load_adapter", "key_mapping"),
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
    parameters = inspect.signature(found).parameters
    # Through **kwargs these two are taken too, in any order.
    extra = ["autocast_adapter_dtype", "torch_device", "ephemeral_gpu_offload", "low_cpu_mem_usage"]
    through = [name for name in extra if path == "PeftModel.load_adapter" and name not in parameters]
    return [
        *parameters,
        *(sorted(through, key=["torch_device", *extra].index) if module is names else []),
    ]


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


def test_wrapping_twice_is_refused() -> None:
    model = wrapped()
    with pytest.raises(AdapterError, match=r"isn't wrapped yet, found a PeftModel; .*model\.add_adapter"):
        get_peft_model(model, LoraConfig(target_modules=["0"]))


def test_running_the_same_cell_twice_is_refused_and_leaves_the_adapter() -> None:
    base = mlp()
    first = get_peft_model(base, LoraConfig(target_modules=["0"]))
    weight = first.model[0].lora_A["default"].weight
    with pytest.raises(AdapterError, match=r"0: .*'default'"):
        get_peft_model(base, LoraConfig(target_modules=["0"]))
    assert first.model[0].lora_A["default"].weight is weight
    assert first.active_adapters == ["default"]


def test_set_requires_grad_leaves_the_active_adapter() -> None:
    model = wrapped()
    model.set_requires_grad("default", False)
    assert model.get_nb_trainable_parameters()[0] == 0
    model.set_requires_grad(["default"])
    assert model.model[0].lora_A["default"].weight.requires_grad
    assert model.active_adapters == ["default"]
    with pytest.raises(AdapterError, match=r"unknown adapter 'nobody'; the model has \['default'\]"):
        model.set_requires_grad("nobody")


# -- states ----------------------------------------------------------------------------------------------------


def test_a_state_dict_given_is_where_values_come_from() -> None:
    model = wrapped()
    gathered = {name: torch.full_like(tensor, 3.0) for name, tensor in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    assert len(state) == 4
    assert all((tensor == 3.0).all() for tensor in state.values())


def test_a_compiled_model_is_looked_into() -> None:
    model = wrapped()
    state = get_peft_model_state_dict(torch.compile(model), unwrap_compiled=True)
    assert state.keys() == get_peft_model_state_dict(model).keys()


def test_loading_a_state_is_strict_and_all_or_nothing() -> None:
    model = wrapped()
    state = get_peft_model_state_dict(model)
    before = copy.deepcopy(state)
    wrong = {key: tensor + 1 for key, tensor in state.items()}
    wrong["base_model.model.0.lora_A.weight"] = torch.zeros(5, 6)
    with pytest.raises(StorageError, match=r"0\.lora_A\.weight"):
        set_peft_model_state_dict(model, wrong)
    torch.testing.assert_close(get_peft_model_state_dict(model), before, rtol=0, atol=0)
    result = set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    after = get_peft_model_state_dict(model)
    for key, tensor in before.items():
        expected = tensor if key == "base_model.model.0.lora_A.weight" else tensor + 1
        torch.testing.assert_close(after[key], expected, rtol=0, atol=0)
    del wrong["base_model.model.2.lora_B.weight"]
    with pytest.raises(StorageError, match=r"2\.lora_B\.weight"):
        set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)


def test_a_bare_model_keeps_its_adapters_through_copies_and_pickles() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), mlp())
    assert not any("_lora_model" in name for name, _ in model.named_modules())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other[0].lora_B["default"].weight.fill_(1.0)
        state = get_peft_model_state_dict(other)
        assert (state["0.lora_B.weight"] == 1).all()
    assert (get_peft_model_state_dict(model)["0.lora_B.weight"] == 0).all()


def test_state_functions_refuse_a_model_without_adapters() -> None:
    with pytest.raises(AdapterError, match=r"from get_peft_model or inject_adapter_in_model, found a Sequential"):
        get_peft_model_state_dict(mlp())
    for status in (get_layer_status, get_model_status):
        with pytest.raises(AdapterError, match="expected a model with adapters, found a Sequential"):
            status(mlp())


def test_status_of_a_bare_model() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), mlp())
    status = get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("Sequential", "None", {})
    assert (status.num_adapter_layers, status.active_adapters) == (1, ["default"])
    assert status.trainable_params == 2 * (6 + 8)
    assert [layer.name for layer in get_layer_status(model)] == ["0"]


# -- files and the Hub -----------------------------------------------------------------------------------------


def test_saving_refuses_what_it_would_otherwise_leave_out(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(
        AdapterError, match=r"save_embedding_layers: expected 'auto' or False, found True; .*modules_to"
    ):
        model.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"path_initial_model_for_weight_conversion: expected None, found 'x'"):
        model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion="x")
    assert list(tmp_path.iterdir()) == []


def test_selected_adapters_subfolders_and_their_weights(tmp_path: Path) -> None:
    model = wrapped()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]
    weights = load_peft_weights(tmp_path, subfolder="other")
    torch.testing.assert_close(weights, get_peft_model_state_dict(model, adapter_name="other"), rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(mlp(), tmp_path, subfolder="other")
    assert list(loaded.peft_config) == ["default"]


def test_a_misspelt_keyword_of_loading_is_an_error(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'torch_devise'; closest: \['torch_device'"):
        PeftModel.from_pretrained(mlp(), tmp_path, torch_devise="cpu")
    PeftModel.from_pretrained(mlp(), tmp_path, torch_device="cpu", ephemeral_gpu_offload=False)


def test_a_repository_is_downloaded_when_the_caller_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped().save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(repo_id: str, **arguments: Any) -> str:
        asked.append((repo_id, arguments.pop("allow_patterns") != [], arguments))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    PeftConfig.from_pretrained("someone/adapter", revision="v1")
    PeftModel.from_pretrained(mlp(), "someone/adapter", token="secret", torch_device="cpu")
    assert asked == [
        ("someone/adapter", True, {"revision": "v1"}),
        ("someone/adapter", True, {"token": "secret"}),
    ]


def test_a_folder_that_is_not_there_is_named() -> None:
    model = mlp()
    layers = list(model)
    for name in ("no/such_adapter", "../no/such/folder"):
        with pytest.raises(StorageError, match=rf"{name}: expected a local folder with an adapter or the id"):
            PeftModel.from_pretrained(model, name)
    assert list(model) == layers


def test_pushing_uploads_the_adapter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: list[Any] = []

    class Repo:
        repo_id = "me/adapter"

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "secret"

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Repo:
            assert (repo_id, private, exist_ok) == ("adapter", True, True)
            return Repo()

        def upload_folder(self, **arguments: Any) -> str:
            files = sorted(path.name for path in Path(arguments["folder_path"]).iterdir())
            uploads.append((arguments["repo_id"], files))
            return "url"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert wrapped().push_to_hub("adapter", private=True, token="secret") == "url"
    assert uploads == [("me/adapter", ["adapter_config.json", "adapter_model.safetensors"])]


def test_auto_checks_the_task_and_the_base(tmp_path: Path) -> None:
    model = wrapped(task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"found 'SEQ_CLS'; load it with AutoPeftModelForSequenceClassification"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected base_model_name_or_path in adapter_config.json, found none"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
