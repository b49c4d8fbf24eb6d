"""``replace_lora_weights_loftq``: the correction of a model that is quantized already."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from reference.lowrank import best_approximation
from tiny_llama import llama, load
from torch import nn

from qlora_kit import LoraConfig, LoraModel, apply_lora, quantize_
from qlora_kit.compat.peft import replace_lora_weights_loftq
from qlora_kit.errors import AdapterError, StorageError
from qlora_kit.layers import AdapterLayer
from qlora_kit.shards import ShardReader

RANK = 4


def adapted(folder: Path, storage: str, **options: object) -> LoraModel:
    config = LoraConfig(r=RANK, target_modules="all-linear", **options)
    model = quantize_(llama(), 2) if storage == "2-bit" else load(folder, storage, torch.float32)
    return apply_lora(model, config)


def residual(layer: AdapterLayer, path: str, folder: Path) -> torch.Tensor:
    return ShardReader(folder).tensor(f"{path}.weight").float() - layer.codec.read(layer.base_layer)


@pytest.mark.parametrize("options", [{"lora_alpha": RANK}, {"lora_alpha": 2 * RANK}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("storage", ["2-bit", "4-bit", "8-bit"])
def test_every_layer_gets_the_best_correction(storage: str, options: dict[str, object], llama_dir: Path) -> None:
    lora = adapted(llama_dir, storage, **options)
    replace_lora_weights_loftq(lora, llama_dir)
    for path, layer in lora.adapter_layers().items():
        left = residual(layer, path, llama_dir)
        expected = best_approximation(left.double().numpy(), RANK)
        # float32 factors of residuals of some 1e-2
        torch.testing.assert_close(layer.delta("default").double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-6)
        assert (left - layer.delta("default")).norm() < left.norm()
    assert lora.backbones.keys() == {"default"}


def test_the_callback_decides(llama_dir: Path) -> None:
    lora = adapted(llama_dir, "4-bit")
    before = {path: [f.clone() for f in layer.factors("default")] for path, layer in lora.adapter_layers().items()}
    calls: list[str] = []

    def keep(model: nn.Module, path: str) -> bool:
        assert model is lora
        calls.append(path)
        return path.endswith("q_proj")

    replace_lora_weights_loftq(lora, llama_dir, callback=keep)
    assert calls == list(lora.adapter_layers())
    for path, layer in lora.adapter_layers().items():
        same = all(torch.equal(a, b) for a, b in zip(layer.factors("default"), before[path], strict=True))
        assert same != path.endswith("q_proj")


def test_what_can_t_work_is_named(llama_dir: Path, tmp_path: Path) -> None:
    lora = adapted(llama_dir, "4-bit")
    with pytest.raises(
        AdapterError, match=r"expected a model with adapter 'other', found LoraModel with \['default'\]"
    ):
        replace_lora_weights_loftq(lora, llama_dir, "other")
    with pytest.raises(AdapterError, match="found Linear with"):
        replace_lora_weights_loftq(nn.Linear(2, 2), llama_dir)
    dense = apply_lora(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="found 2 layers, all dense"):
        replace_lora_weights_loftq(dense, llama_dir)
    llama(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(StorageError, match="pass the folder of the model that was quantized"):
        replace_lora_weights_loftq(lora, tmp_path)
    lora.merge_adapter()
    with pytest.raises(AdapterError, match="expected nothing merged"):
        replace_lora_weights_loftq(lora, llama_dir)


def test_without_a_path_the_base_s_own_folder_is_looked_at(llama_dir: Path) -> None:
    lora = adapted(llama_dir, "4-bit", base_model_name_or_path=str(llama_dir))
    replace_lora_weights_loftq(lora)
    nowhere = adapted(llama_dir, "4-bit", base_model_name_or_path="nobody/nothing")
    with pytest.raises(StorageError, match=r"16-bit weights of 'nobody/nothing' on this disk, found none; pass model"):
        replace_lora_weights_loftq(nowhere)
