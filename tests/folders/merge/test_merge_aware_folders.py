"""Adapters that are trained for a merge, merged on the disk: the weights that the model in memory computes with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from disk_merges import gpt2, llama, logits, on_disk, save_adapter, save_base
from transformers import AutoModelForCausalLM

from qlora_kit import LoraModel
from qlora_kit.codecs import codec_for, protect_storage_
from qlora_kit.folders.combine import combine_folders
from qlora_kit.naming import Tree


def read(model: torch.nn.Module, path: str) -> torch.Tensor:
    module = Tree(model).modules[path]
    return codec_for(module, path).read(module)


@pytest.mark.parametrize(
    ("storage", "aware"),
    [
        ("float32", "nf4"),
        ("bfloat16", {"into": "signed2", "blocksize": 32, "double_quant": True}),
        ("nf4", "same"),
        ("nf4", "nf3"),
        ("fp4-double", "same"),
        ("int8", "same"),
        ("signed2-double", "same"),
    ],
)
def test_the_merge_that_it_is_trained_for(storage: str, aware: object, tmp_path: Path) -> None:
    """Asked for by nothing but the adapter."""
    base = save_base(llama(), tmp_path / "base", storage)
    adapter = save_adapter(base, tmp_path / "adapter", merge_aware=aware)
    assert json.loads((adapter / "adapter_config.json").read_text())["merge_aware"] == aware
    lora = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    expected = {path: layer.as_merged(["default"]) for path, layer in lora.adapter_layers().items()}
    before = logits(lora)
    report = on_disk(base, [adapter], tmp_path / "out", into=None, force=False)
    assert report.trained
    assert "the adapters are trained for this merge" in str(report)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    protect_storage_(merged)
    for path, held in expected.items():
        assert held is not None
        assert torch.equal(read(merged, path), held.codec.read(held.module)), path
    assert torch.allclose(logits(merged), before, atol=2e-2 if storage == "bfloat16" else 1e-5)


def test_conv1d(tmp_path: Path) -> None:
    base = save_base(gpt2(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", ["c_attn", "c_fc"], merge_aware="nf3")
    lora = LoraModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    before = logits(lora)
    assert on_disk(base, [adapter], tmp_path / "out", into=None).trained
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), before, atol=1e-5)


def test_another_merge_warns_and_none_is_bfloat16(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", merge_aware="nf4")
    with pytest.warns(UserWarning, match=r"trained to be merged into 'nf4' \(merge_aware\).*into='float32'"):
        report = on_disk(base, [adapter], tmp_path / "out", into="float32")
    assert not report.trained
    kbit = save_base(llama(), tmp_path / "kbit", "nf3")
    same = save_adapter(kbit, tmp_path / "same", merge_aware="same")
    with pytest.warns(UserWarning, match=r"trained to be merged into 'same' .*base isn't quantized"):
        report = on_disk(base, [same], tmp_path / "dense", into=None)
    assert not report.trained
    plain = save_adapter(base, tmp_path / "plain")
    assert on_disk(base, [plain], tmp_path / "other", into=None).into == "bfloat16"


def test_a_combination_is_trained_for_nothing(tmp_path: Path) -> None:
    base = save_base(llama(), tmp_path / "base")
    adapters = [save_adapter(base, tmp_path / f"a{seed}", seed=seed, merge_aware="nf4") for seed in (1, 2)]
    combine_folders(adapters, [0.5, 0.5], tmp_path / "both", "cat")
    assert "merge_aware" not in json.loads((tmp_path / "both" / "adapter_config.json").read_text())
