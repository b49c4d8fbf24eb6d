"""Configurations of stored adapters say more than one model has; the keys of the file decide whether they fit."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama
from transformers import BertConfig, BertForSequenceClassification, LlamaForCausalLM

from qlora_kit import LoraConfig, LoraModel, TargetError, apply_lora
from qlora_kit.errors import ConfigError, StorageError
from qlora_kit.folders import combine_folders, compress_folder, merge_folders

IDS = torch.arange(16).view(2, 8)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDLE: dict[str, dict[str, Any]] = {
    "target": {"target_modules": ["q_proj", "query_key_value", "v_proj"]},
    "target trained whole": {"target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "layers": {"layers_to_transform": list(range(32))},
    "layers with a pattern": {"layers_to_transform": list(range(32)), "layers_pattern": ["h", "layers"]},
    "rank": {"rank_pattern": {"experts.w1": 16, "v_proj": 2}},
    "alpha": {"alpha_pattern": {"experts.w1": 16, r".*\.dense": 3, "v_proj": 4}},
    "exclusion": {"exclude_modules": ["vision_tower", "mlp"]},
    "exclusion by regex": {"exclude_modules": r".*vision.*"},
}
NULLS = ("bias", "init_lora_weights", "use_rslora", "fan_in_fan_out", "lora_dropout", "inference_mode")


def base() -> LlamaForCausalLM:
    return llama().eval()


def live(change: dict[str, Any]) -> dict[str, Any]:
    """What of ``change`` a new adapter may be asked for."""
    new = {"r": 4, "target_modules": ["q_proj", "v_proj"], **change}
    new["target_modules"] = ["q_proj", "v_proj"]
    new.pop("exclude_modules", None)
    if "layers_to_transform" in new:
        new["layers_to_transform"] = [0, 1]
    for field in ("rank_pattern", "alpha_pattern"):
        new[field] = {key: value for key, value in new.get(field, {}).items() if key == "v_proj"}
    return new


def stored(folder: Path, change: dict[str, Any]) -> torch.Tensor:
    """An adapter in ``folder`` whose configuration has ``change``; what the model computes with it."""
    torch.manual_seed(2)
    lora = apply_lora(base(), LoraConfig(**live(change), init_lora_weights=False)).eval()
    lora.save_pretrained(folder)
    rewrite(folder, change)
    return lora(IDS).logits.detach()


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))


@pytest.mark.slow
@pytest.mark.parametrize("change", IDLE.values(), ids=IDLE)
def test_what_selects_nothing_is_passed_over_in_a_stored_adapter_and_an_error_in_a_new_one(
    change: dict[str, Any], tmp_path: Path
) -> None:
    expected = stored(tmp_path, change)
    lora = LoraModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(lora(IDS).logits, expected, rtol=0, atol=0)
    beside = apply_lora(base(), LoraConfig(r=1, target_modules=["o_proj"]), "other").eval()
    beside.load_adapter(tmp_path, "stored")
    beside.set_adapter("stored")
    torch.testing.assert_close(beside(IDS).logits, expected, rtol=0, atol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says what it passes over
        theirs = peft.PeftModel.from_pretrained(base(), str(tmp_path)).eval()
    torch.testing.assert_close(lora(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-6)

    lora.save_pretrained(tmp_path / "again")
    again = LoraModel.from_pretrained(base(), tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=0, atol=0)
    with pytest.raises(TargetError, match=r"matches no module|no selected module"):
        apply_lora(base(), LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **change}))


@pytest.mark.slow
@pytest.mark.parametrize("change", IDLE.values(), ids=IDLE)
def test_folders_are_combined_and_merged_as_well(change: dict[str, Any], tmp_path: Path) -> None:
    expected = stored(tmp_path / "a", change)
    base().save_pretrained(tmp_path / "base")
    combine_folders([tmp_path / "a"], [1.0], tmp_path / "one", check_backbone=False)
    compress_folder(tmp_path / "a", tmp_path / "less", energy=1.0)
    merge_folders(tmp_path / "base", [tmp_path / "a"], tmp_path / "merged", into="float32", check_backbone=False)
    for folder in ("one", "less"):
        found = LoraModel.from_pretrained(base(), tmp_path / folder)(IDS).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("field", [*NULLS, "rank_pattern", "alpha_pattern"])
def test_null_is_the_default_where_it_can_mean_nothing_else(field: str, tmp_path: Path) -> None:
    expected = stored(tmp_path, {})
    rewrite(tmp_path, {field: None})
    found = LoraModel.from_pretrained(base(), tmp_path)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    compress_folder(tmp_path, tmp_path / "less", rank=2)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_null_is_refused_where_it_would_decide_what_is_computed(field: str, tmp_path: Path) -> None:
    stored(tmp_path, {})
    rewrite(tmp_path, {field: None})
    with pytest.raises(ConfigError, match=f"{field}: expected"):
        LoraModel.from_pretrained(base(), tmp_path)


@pytest.mark.parametrize("layers", [1, [0, 7]])
def test_layers_say_nothing_where_all_targets_are_whole_paths(layers: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], layers_to_transform=layers, init_lora_weights=False)
    theirs, x = peft.get_peft_model(copy.deepcopy(net), config).eval(), torch.randn(3, 4)
    theirs.save_pretrained(str(tmp_path))
    ours = LoraModel.from_pretrained(net, tmp_path)
    assert list(ours.adapter_layers()) == ["0", "1"]
    torch.testing.assert_close(ours(x), theirs(x))


def test_the_keys_of_the_file_still_guard_the_load(tmp_path: Path) -> None:
    stored(tmp_path, {"layers_to_transform": list(range(32))})
    model = base()
    before = dict(model.named_modules())
    state = load_file(tmp_path / WEIGHTS)
    far = {key.replace("layers.1.", "layers.7."): value.clone() for key, value in state.items() if "layers.1." in key}
    save_file({**state, **far}, tmp_path / WEIGHTS)
    with pytest.raises(StorageError, match=r"unexpected: .*layers\.7\."):
        LoraModel.from_pretrained(model, tmp_path)
    for change in ({"target_modules": ["q_proj"]}, {"rank_pattern": {"v_proj": 2}}):
        folder = tmp_path / "other"
        shutil.rmtree(folder, ignore_errors=True)
        stored(folder, {})
        rewrite(folder, change)
        with pytest.raises(StorageError, match=r"unexpected: |mis-shaped: "):
            LoraModel.from_pretrained(model, folder)
    for change in ({"target_modules": ["query_key_value"]}, {"layers_to_transform": [7]}):
        rewrite(folder, {"rank_pattern": {}, "target_modules": ["q_proj", "v_proj"], **change})
        with pytest.raises(TargetError, match=r"query_key_value|\[7\]"):
            LoraModel.from_pretrained(model, folder)
    assert dict(model.named_modules()) == before


def test_pefts_all_linear_names_a_head_that_it_trains_whole(tmp_path: Path) -> None:
    def classifier() -> BertForSequenceClassification:
        torch.manual_seed(0)
        sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2)).eval()

    config = peft.LoraConfig(r=2, target_modules="all-linear", modules_to_save=["classifier"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about a name that PEFT uses
        theirs = peft.get_peft_model(classifier(), config).eval()
    theirs.save_pretrained(tmp_path)
    assert "classifier" in json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    ours = LoraModel.from_pretrained(classifier(), tmp_path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
