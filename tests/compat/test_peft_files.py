"""Adapters as state dicts, folders and Hub repositories under PEFT's names."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_mlp import mlp, wrapped

from qlora_kit.compat.peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from qlora_kit.errors import AdapterError, ConfigError, StorageError

# -- states ----------------------------------------------------------------------------------------------------


def test_a_state_dict_given_is_where_values_come_from() -> None:
    model = wrapped()
    gathered = {name: torch.full_like(tensor, 3.0) for name, tensor in model.state_dict().items()}
    state = get_peft_model_state_dict(model, state_dict=gathered)
    assert len(state) == 4
    assert all((tensor == 3.0).all() for tensor in state.values())


def test_a_compiled_model_is_looked_into() -> None:
    model = wrapped()
    state = get_peft_model_state_dict(torch.compile(model, backend="eager"), unwrap_compiled=True)
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
    with pytest.warns(UserWarning, match=r"0\.lora_A\.weight \(\(5, 6\) for \(2, 6\)\)"):
        result = set_peft_model_state_dict(model, wrong, ignore_mismatched_sizes=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    after = get_peft_model_state_dict(model)
    for key, tensor in before.items():
        expected = tensor if key == "base_model.model.0.lora_A.weight" else tensor + 1
        torch.testing.assert_close(after[key], expected, rtol=0, atol=0)
    del wrong["base_model.model.2.lora_B.weight"]
    with pytest.warns(UserWarning, match="left out"), pytest.raises(StorageError, match=r"2\.lora_B\.weight"):
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
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("other", "None", {})
    assert (status.num_adapter_layers, status.active_adapters) == (1, ["default"])
    assert status.trainable_params == 2 * (6 + 8)
    assert [layer.name for layer in get_layer_status(model)] == ["0"]


# -- files and the Hub -----------------------------------------------------------------------------------------


def test_saving_refuses_what_it_would_otherwise_leave_out(tmp_path: Path) -> None:
    model = wrapped()
    with pytest.raises(AdapterError, match=r"save_embedding_layers: expected 'auto', True or False, found 'yes'"):
        model.save_pretrained(tmp_path, save_embedding_layers="yes")
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
    assert uploads == [("me/adapter", ["README.md", "adapter_config.json", "adapter_model.safetensors"])]


def test_auto_checks_the_task_and_the_base(tmp_path: Path) -> None:
    model = wrapped(task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"found 'SEQ_CLS'; load it with AutoPeftModelForSequenceClassification"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    wrapped().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"expected base_model_name_or_path in adapter_config.json, found none"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path)
