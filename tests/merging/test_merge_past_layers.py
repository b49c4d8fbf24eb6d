"""Merging into few bits where the model reads weights, or their dtype, past the layers: these stay dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

from qlora_kit import LoraConfig, LoraModel, apply_lora, merge
from qlora_kit.folders import merge_folders

BATCH = {"input_ids": torch.arange(5, 17)[None], "decoder_input_ids": torch.arange(5, 13)[None]}


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(**BATCH).logits


@pytest.mark.parametrize("into", ["nf4", "nf2"])
@pytest.mark.slow
def test_t5_in_memory_and_on_disk(into: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4, "d_kv": 16, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "base")
    load = T5ForConditionalGeneration.from_pretrained
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    lora = apply_lora(load(tmp_path / "base"), config)
    lora.save_pretrained(tmp_path / "adapter")
    right = logits(lora)
    report = merge(lora, into=into, force=True)
    stored = {
        name: type(module).__name__ for name, module in report.model.named_modules() if name.endswith(("wo", "wi"))
    }
    assert {kind for name, kind in stored.items() if name.endswith("wo")} == {"Linear"}
    assert {kind for name, kind in stored.items() if name.endswith("wi")} == {
        "Linear4bit" if into == "nf4" else "PackedLinear"
    }
    found = logits(report.model)
    assert (found - right).norm() < {"nf4": 0.3, "nf2": 0.9}[into] * right.norm()
    merge_folders(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out", into=into, force=True)
    again = logits(load(tmp_path / "out"))
    assert (again - found).norm() < 0.02 * found.norm()  # bitsandbytes' forward in eval has its scales in 16 bits


def test_torchs_attention() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.TransformerEncoderLayer(64, 4, 64, batch_first=True, dropout=0.0)).eval()
    targets = ["0", "linear1", "out_proj"]
    lora: LoraModel = apply_lora(net, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        right = lora(x)
        merged = merge(lora, into="nf4", force=True).model
        assert (merged(x) - right).norm() < 0.3 * right.norm()
    assert [type(merged.get_submodule(path)).__name__ for path in ("0", "1.linear1")] == ["Linear4bit", "Linear"]
