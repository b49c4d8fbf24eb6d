"""``loftq init`` on checkpoints that call their tensors otherwise than the model does."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from disk_models import ADAPTER_FOLDER, assert_same, config, streamed, tensors, write
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from loftq.disk.verify import verify
from qlora_kit import LoraModel, apply_lora, codec_for
from qlora_kit.checkpoints.originals import original_weight
from qlora_kit.checkpoints.shards import ShardReader
from qlora_kit.codecs.bnb import quantize_linear

SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
PIXELS = {**SIZES, "image_size": 16, "patch_size": 8}
IMAGE = 4


def vit() -> ViTForImageClassification:
    return ViTForImageClassification(ViTConfig(**PIXELS))


def llava() -> LlavaForConditionalGeneration:
    text, pixels = {**TEXT, "model_type": "llama"}, {**PIXELS, "model_type": "clip_vision_model"}
    config = LlavaConfig(text_config=text, vision_config=pixels, image_token_index=IMAGE, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def gemma3() -> Gemma3ForConditionalGeneration:
    text, pixels = {**TEXT, "head_dim": 16}, {**PIXELS, "vision_use_head": False}
    config = Gemma3Config(text_config=text, vision_config=pixels, mm_tokens_per_image=4, image_token_id=IMAGE)
    return Gemma3ForConditionalGeneration(config)


MODELS = {"vit": vit, "llava": llava, "gemma3": gemma3}


def batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
    if name == "vit":
        return pixels
    ids = torch.randint(8, 64, (2, 24), generator=draw)
    ids[:, 2:6] = IMAGE
    return {**pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    return {name: write(make(), folder / name) for name, make in MODELS.items()}


def load(name: str, folder: Path) -> PreTrainedModel:
    return type(MODELS[name]()).from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("vit", 2), ("llava", 2), ("gemma3", 4)])
def test_what_is_written_is_what_a_start_in_memory_gives(
    name: str, bits: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    source, out = sources[name], tmp_path / "out"
    report = streamed(source, out, config(bits))
    renamed = [row.path for row in report.layers if f"{row.path}.weight" not in ShardReader(source)]
    assert renamed, "a checkpoint with names of its own"
    assert len(list(verify(out, source, layers=len(report.layers)))) == 4 + len(report.layers)
    start = apply_lora(load(name, source), config(bits))
    expected = logits(start, batch(name))
    start.save_pretrained(tmp_path / "memory")
    assert_same(tensors(out / ADAPTER_FOLDER), tensors(tmp_path / "memory"))
    again = LoraModel.from_pretrained(load(name, out), out / ADAPTER_FOLDER)
    assert torch.equal(logits(again, batch(name)), expected)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own use of it
@pytest.mark.slow
def test_peft_takes_the_adapter(sources: dict[str, Path], tmp_path: Path) -> None:
    report = streamed(sources["llava"], tmp_path / "out", config(4))
    adapter = tmp_path / "out" / ADAPTER_FOLDER
    adapted = peft.PeftModel.from_pretrained(load("llava", tmp_path / "out"), str(adapter))
    found, stored = peft.get_peft_model_state_dict(adapted), tensors(adapter)
    assert len(stored) == 2 * len(report.layers)
    assert_same(found, stored)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:calibration.*rank-deficient")  # of tiny pictures
def test_with_the_inputs_of_each_layer(sources: dict[str, Path], tmp_path: Path) -> None:
    """The model's own weights come from the shards while text and pictures run through it."""
    options = {"method": "aligned", "calibration": [batch("gemma3", seed) for seed in (1, 2)]}
    report = streamed(sources["gemma3"], tmp_path / "out", config(2, **options))
    assert all(row.output_error is not None for row in report.layers)
    apply_lora(load("gemma3", sources["gemma3"]), config(2, **options)).save_pretrained(tmp_path / "memory")
    assert_same(tensors(tmp_path / "out" / ADAPTER_FOLDER), tensors(tmp_path / "memory"))


def test_the_originals_of_a_quantized_model(sources: dict[str, Path]) -> None:
    model, path = load("gemma3", sources["gemma3"]), "model.language_model.layers.0.mlp.up_proj"
    full = model.get_submodule(path).weight.detach()
    stored = codec_for(quantized := quantize_linear(model.get_submodule(path), full)).read(quantized)
    assert torch.equal(original_weight(sources["gemma3"], path, stored), full)


@pytest.mark.slow
def test_a_weight_that_is_stored_twice_is_written_once(sources: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(sources["vit"], tmp_path / "source")
    stored = tensors(source)
    own = next(name for name in stored if name.endswith("intermediate.dense.weight"))
    save_file({**stored, own.removeprefix("vit."): stored[own].clone()}, source / "model.safetensors", {"format": "pt"})
    streamed(source, tmp_path / "out", config(2))
    streamed(sources["vit"], tmp_path / "expected", config(2))
    assert_same(tensors(tmp_path / "out"), tensors(tmp_path / "expected"))
