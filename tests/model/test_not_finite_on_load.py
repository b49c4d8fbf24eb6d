"""A file with NaN or infinity is refused by name, unless one asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import llama

from qlora_kit import LoraConfig, LoraModel, StorageError, apply_lora

KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(value: float, tmp_path: Path) -> None:
    apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    state[KEY][3, 1] = value
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = llama()
    expected = rf"expected finite values, found NaN or infinity in 1 of \d+ tensors \({KEY}\).*check_finite=False"
    with pytest.raises(StorageError, match=expected):
        LoraModel.from_pretrained(model, tmp_path)
    lora = apply_lora(model, LoraConfig(r=2, target_modules=["q_proj"]), "other")
    with pytest.raises(StorageError, match=expected):
        lora.load_adapter(tmp_path, "new")
    assert list(lora.peft_config) == ["other"]
    lora.load_adapter(tmp_path, "new", check_finite=False)
    assert not torch.isfinite(lora.adapter_layers()["model.layers.0.self_attn.q_proj"].factors("new")[1]).all()
