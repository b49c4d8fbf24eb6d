"""PEFT's ``replace_lora_weights_loftq``: adapters of a model that is quantized already, from its 16-bit shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from reference.lowrank import best_approximation
from safetensors.torch import load_file
from tiny_llama import llama, load
from torch import Tensor, nn

from qlora_kit.compat.peft import LoraConfig, LoraModel, get_peft_model, replace_lora_weights_loftq
from qlora_kit.errors import AdapterError, StorageError
from qlora_kit.layers import AdapterLayer

RANK = 4
KBIT = ["4-bit", "8-bit"]


def wrapped(folder: Path, storage: str, alpha: int = RANK, **options: object) -> LoraModel:
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules="all-linear", **options)
    return get_peft_model(load(folder, storage, torch.float32), config)


def originals(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def residual(layer: AdapterLayer, full: Tensor) -> np.ndarray:
    return full.double().numpy() - layer.codec.read(layer.base_layer).double().numpy()


def product(layer: AdapterLayer, adapter: str = "default") -> np.ndarray:
    A, B = (factor.detach().double().numpy() for factor in layer.factors(adapter))
    return layer.scaling[adapter] * B @ A


def factors_of(model: LoraModel, adapter: str = "default") -> dict[str, tuple[Tensor, ...]]:
    layers = model.adapter_layers().items()
    return {path: tuple(f.detach().clone() for f in layer.factors(adapter)) for path, layer in layers}


def unchanged(model: LoraModel, before: dict[str, tuple[Tensor, ...]], adapter: str = "default") -> set[str]:
    """The layers whose factors have the bits that they had."""
    now = factors_of(model, adapter)
    return {
        path for path, pair in before.items() if all(torch.equal(*both) for both in zip(pair, now[path], strict=True))
    }


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK, 1])
@pytest.mark.parametrize("storage", KBIT)
@pytest.mark.slow
def test_every_layer_comes_nearer_to_its_weight(llama_dir: Path, storage: str, alpha: int) -> None:
    model = wrapped(llama_dir, storage, alpha)
    bases = {path: layer.codec.read(layer.base_layer) for path, layer in model.adapter_layers().items()}
    replace_lora_weights_loftq(model, llama_dir)
    full = originals(llama_dir)
    assert len(bases) == 2 * 7
    for path, layer in model.adapter_layers().items():
        left = residual(layer, full[f"{path}.weight"])
        assert np.linalg.norm(left - product(layer)) < np.linalg.norm(left)
        # The best of rank 4, whatever the scaling, to float32's rounding of the factors.
        best = np.linalg.norm(np.linalg.svd(left, compute_uv=False)[RANK:])
        assert np.linalg.norm(left - product(layer)) == pytest.approx(best, rel=1e-5)
        assert torch.equal(layer.codec.read(layer.base_layer), bases[path]), "the base stays"


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("storage", KBIT)
def test_the_branch_is_the_best_approximation(llama_dir: Path, storage: str, use_rslora: bool) -> None:
    model = wrapped(llama_dir, storage, 2 * RANK, use_rslora=use_rslora)
    path = "model.layers.1.self_attn.v_proj"
    replace_lora_weights_loftq(model, llama_dir)
    layer = model.adapter_layers()[path]
    expected = best_approximation(residual(layer, originals(llama_dir)[f"{path}.weight"]), RANK)
    # Where neighbouring singular values are close the choice of directions turns by float32's rounding over the gap.
    np.testing.assert_allclose(product(layer), expected, atol=1e-3 * np.abs(expected).max())


def test_without_a_folder_the_base_model_s_own_is_read(llama_dir: Path) -> None:
    given, found = (wrapped(llama_dir, "4-bit") for _ in range(2))
    replace_lora_weights_loftq(given, llama_dir)
    replace_lora_weights_loftq(found)
    assert unchanged(found, factors_of(given)) == set(found.adapter_layers())
    found.peft_config["default"].base_model_name_or_path = "nobody/has-this-model"
    with pytest.raises(StorageError, match="16-bit weights of 'nobody/has-this-model' on this disk, found none"):
        replace_lora_weights_loftq(found)


@pytest.mark.parametrize("storage", KBIT)
def test_a_callback_decides_layer_by_layer(llama_dir: Path, storage: str) -> None:
    model = wrapped(llama_dir, storage, init_lora_weights=False)
    before, calls = factors_of(model), []

    def keep_attention(given: nn.Module, path: str) -> bool:
        assert given is model
        assert path not in unchanged(model, before), "the new factors are in place when it is asked"
        calls.append(path)
        return "self_attn" in path

    replace_lora_weights_loftq(model, llama_dir, callback=keep_attention)
    assert sorted(calls) == sorted(before)
    assert unchanged(model, before) == {path for path in before if "mlp" in path}


def test_a_named_adapter_is_replaced_alone(llama_dir: Path) -> None:
    model = wrapped(llama_dir, "4-bit", init_lora_weights=False)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    before = factors_of(model)
    layer = model.adapter_layers()["model.layers.0.self_attn.q_proj"]
    replace_lora_weights_loftq(model, llama_dir, adapter_name="second")
    assert unchanged(model, before) == set(before)
    left = residual(layer, originals(llama_dir)["model.layers.0.self_attn.q_proj.weight"])
    assert np.linalg.norm(left - product(layer, "second")) < np.linalg.norm(left)


def test_the_adapter_then_fits_this_base_alone(llama_dir: Path, tmp_path: Path) -> None:
    model = wrapped(llama_dir, "4-bit")
    assert model.backbones == {}
    replace_lora_weights_loftq(model, llama_dir)
    model.save_pretrained(tmp_path)
    LoraModel.from_pretrained(load(llama_dir, "4-bit", torch.float32), tmp_path)
    with pytest.raises(StorageError, match="expected the quantized base model that this adapter was started on"):
        LoraModel.from_pretrained(load(llama_dir, "dense", torch.float32), tmp_path)


def test_the_wrong_model_or_adapter_is_refused(llama_dir: Path) -> None:
    model = wrapped(llama_dir, "4-bit")
    with pytest.raises(AdapterError, match=r"a model with adapter 'other', found .* with \['default'\]"):
        replace_lora_weights_loftq(model, llama_dir, adapter_name="other")
    with pytest.raises(AdapterError, match=r"found LlamaForCausalLM with .*; wrap the model"):
        replace_lora_weights_loftq(load(llama_dir, "4-bit", torch.float32), llama_dir)
    with pytest.raises(AdapterError, match="found 14 layers, all dense; load the base quantized"):
        replace_lora_weights_loftq(wrapped(llama_dir, "dense"), llama_dir)


@pytest.mark.parametrize("storage", KBIT)
def test_merged_adapters_are_refused(llama_dir: Path, storage: str) -> None:
    model = wrapped(llama_dir, storage, init_lora_weights=False)
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"expected nothing merged, found \['default'\]; unmerge"):
        replace_lora_weights_loftq(model, llama_dir)


def test_other_weights_are_refused(llama_dir: Path, tmp_path: Path) -> None:
    model = wrapped(llama_dir, "4-bit", init_lora_weights=False)
    before = factors_of(model)
    other = llama()
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.02)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(StorageError, match="to be the weight that the module was quantized from, found one at a"):
        replace_lora_weights_loftq(model, tmp_path / "other")
    llama(hidden_size=32).save_pretrained(tmp_path / "smaller")
    with pytest.raises(StorageError, match=r"expected a weight of shape \(64, 64\) .* of shape \(32, 32\)"):
        replace_lora_weights_loftq(model, tmp_path / "smaller")
    with pytest.raises(StorageError, match="nowhere"):
        replace_lora_weights_loftq(model, tmp_path / "nowhere")
    assert unchanged(model, before) == set(before)
    assert model.backbones == {}


def test_a_file_or_an_index_will_do(llama_dir: Path, tmp_path: Path) -> None:
    expected, model = wrapped(llama_dir, "4-bit"), load(llama_dir, "dense", torch.float32)
    replace_lora_weights_loftq(expected, llama_dir)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    # The last is what a script says that doesn't know of the shards.
    for path in (
        llama_dir / "model.safetensors",
        tmp_path / "model.safetensors.index.json",
        tmp_path / "model.safetensors",
    ):
        found = wrapped(llama_dir, "4-bit")
        replace_lora_weights_loftq(found, str(path))
        assert unchanged(found, factors_of(expected)) == set(found.adapter_layers()), path.name
