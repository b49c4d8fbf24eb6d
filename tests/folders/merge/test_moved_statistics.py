"""Running statistics that an adapter moved go into the merged folder."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from qlora_kit import LoraConfig, apply_lora
from qlora_kit.folders.merge.run import merge_folders


def test_a_merged_folder_computes_with_the_adapters_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    base = ResNetForImageClassification(config)
    base.save_pretrained(tmp_path / "base")
    pixels = torch.randn(4, 3, 32, 32)
    lora = apply_lora(base, LoraConfig(r=2, target_modules=["convolution"], init_lora_weights=False))
    lora.train()
    with torch.no_grad():
        lora(pixels * 3 + 1)
    lora.save_pretrained(tmp_path / "adapter")
    merge_folders(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "merged", into="float32")
    merged = ResNetForImageClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(pixels).logits, lora.eval()(pixels).logits, rtol=1e-4, atol=1e-4)
    moved = merged.resnet.embedder.embedder.normalization.running_mean
    assert not torch.equal(moved, torch.zeros_like(moved))
