"""From an adapter's folder alone to its base model, here and in PEFT, with a task type and without."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_llama import load
from tiny_mlp import mlp

from qlora_kit import LoraConfig as OwnConfig
from qlora_kit import apply_lora
from qlora_kit.compat.peft import AutoPeftModel, AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from qlora_kit.errors import ConfigError

IDS = torch.tensor([[1, 5, 9, 2]])


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="the peer that opens these files isn't installed")


def saved(folder: Path, base: Path, **fields: Any) -> torch.Tensor:
    """An adapter in ``folder``, and its logits."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields)
    model = get_peft_model(load(base, "dense", torch.float32), config).eval()
    model.save_pretrained(folder)
    return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_pefts_classes_open_ours(llama_dir: Path, tmp_path: Path, task: str | None, peft: Any) -> None:
    expected = saved(tmp_path, llama_dir, task_type=task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = [peft.AutoPeftModelForCausalLM] + ([] if task else [peft.AutoPeftModel])
        for kind in opened:
            model = kind.from_pretrained(tmp_path, dtype=torch.float32).eval()
            torch.testing.assert_close(model(IDS).logits, expected)


def test_ours_open_theirs(llama_dir: Path, tmp_path: Path, peft: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        theirs = peft.get_peft_model(load(llama_dir, "dense", torch.float32), config).eval()
        theirs.save_pretrained(tmp_path)
    for kind in (AutoPeftModel, AutoPeftModelForCausalLM):
        model = kind.from_pretrained(tmp_path, dtype=torch.float32)
        assert isinstance(model, PeftModel)
        torch.testing.assert_close(model(IDS).logits, theirs(IDS).logits)


def test_the_class_of_the_base_is_written_where_there_is_no_task(llama_dir: Path, tmp_path: Path) -> None:
    saved(tmp_path / "none", llama_dir)
    mapping = json.loads((tmp_path / "none" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping == {
        "base_model_class": "LlamaForCausalLM",
        "parent_library": transformers.LlamaForCausalLM.__module__,
    }
    saved(tmp_path / "task", llama_dir, task_type="CAUSAL_LM")
    assert json.loads((tmp_path / "task" / "adapter_config.json").read_text())["auto_mapping"] is None
    apply_lora(mlp(), OwnConfig(target_modules=["0"])).save_pretrained(tmp_path / "own")
    mapping = json.loads((tmp_path / "own" / "adapter_config.json").read_text())["auto_mapping"]
    assert mapping["base_model_class"] == "Sequential"


def test_an_adapter_with_a_task_has_a_class_of_its_own(llama_dir: Path, tmp_path: Path) -> None:
    saved(tmp_path, llama_dir, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="found 'CAUSAL_LM'; load it with AutoPeftModelForCausalLM"):
        AutoPeftModel.from_pretrained(tmp_path)


def test_nothing_is_imported_that_the_caller_did_not_allow(llama_dir: Path, tmp_path: Path) -> None:
    saved(tmp_path, llama_dir)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "auto_mapping": {"base_model_class": "system", "parent_library": "os"}}))
    for kind in (AutoPeftModel, AutoPeftModelForCausalLM):
        with pytest.raises(ConfigError, match=r"found os\.system; .* pass import_allowlist=\['os'\]"):
            kind.from_pretrained(tmp_path)
    path.write_text(
        json.dumps({**fields, "auto_mapping": {"base_model_class": "Nope", "parent_library": "transformers"}})
    )
    with pytest.raises(ConfigError, match=r"expected a class that can be imported, found transformers\.Nope"):
        AutoPeftModel.from_pretrained(tmp_path)
    path.write_text(json.dumps({**fields, "auto_mapping": None}))
    with pytest.raises(ConfigError, match="expected an auto_mapping with the base model's class"):
        AutoPeftModel.from_pretrained(tmp_path)
