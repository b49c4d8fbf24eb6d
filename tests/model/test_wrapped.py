"""Models that are wrapped in part or whole, before or after they get adapters: names, files and merges are the plain
model's. And adapters whose files have the names of an older release."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kit import AdapterError, LoraConfig, LoraModel, StorageError, apply_lora, merge, quantize_
from qlora_kit.naming import module_at

IDS = torch.arange(16).view(2, 8)
CONFIG: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def blocks(wrap: Callable[[nn.Module], Any]) -> Callable[[Any], Any]:
    def wrapped(model: Any) -> Any:
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = wrap(layer)
        return model

    return wrapped


def leaves(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.down_proj = compiled(layer.mlp.down_proj)
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "blocks compiled": blocks(compiled),
    "blocks checkpointed": blocks(checkpoint_wrapper),
    "blocks compiled and checkpointed": blocks(lambda block: compiled(checkpoint_wrapper(block))),
    "a linear compiled": leaves,
    "compiled whole": compiled,
    "data parallel": DataParallel,
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, Tensor]:
    """An adapter of the plain model, and what the model computes with it."""
    lora = apply_lora(base(), LoraConfig(**CONFIG)).eval()
    lora.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain", logits(lora)


@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS)
@pytest.mark.slow
def test_wrapped_before(wrap: Callable[[Any], Any], plain: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = plain
    lora = LoraModel.from_pretrained(wrap(base()), folder)
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-6)
    lora.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert again.keys() == stored(folder).keys()
    assert all(torch.equal(again[key], value) for key, value in stored(folder).items())
    assert "_orig_mod" not in (tmp_path / "again" / "adapter_config.json").read_text()
    merged = merge(lora, into="float32").model
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WAYS.values(), ids=WAYS)
def test_wrapped_before_and_targets_left_to_us(wrap: Callable[[Any], Any]) -> None:
    wrapped, unwrapped = (
        apply_lora(model, LoraConfig(target_modules="all-linear")) for model in (wrap(base()), base())
    )
    assert list(wrapped.adapter_layers()) == list(unwrapped.adapter_layers())
    assert wrapped.peft_config["default"].target_modules == unwrapped.peft_config["default"].target_modules


@pytest.mark.parametrize("wrap", [blocks(compiled), blocks(checkpoint_wrapper)], ids=["compiled", "checkpointed"])
@pytest.mark.slow
def test_wrapped_after(wrap: Callable[[Any], Any], plain: tuple[Path, Tensor], tmp_path: Path) -> None:
    folder, expected = plain
    lora = LoraModel.from_pretrained(base(), folder)
    wrap(lora.model)
    lora.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(folder).keys()
    lora.load_adapter(folder, "second")
    lora.set_adapter("second")
    torch.testing.assert_close(logits(lora), expected, rtol=0, atol=1e-6)
    with lora.disable_adapter():
        torch.testing.assert_close(logits(lora), logits(base()), rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(lora.unload()), logits(base()), rtol=0, atol=1e-6)


def distributed(module: nn.Module) -> Any:
    return DistributedDataParallel(module)


def sharded(module: nn.Module) -> Any:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    "wrap",
    [distributed, blocks(distributed), sharded, blocks(sharded)],
    ids=["DDP", "blocks in DDP", "FSDP", "blocks in FSDP"],
)
@pytest.mark.slow
def test_in_the_wrappers_of_several_processes(
    wrap: Callable[[Any], Any], before: bool, plain: tuple[Path, Tensor], tmp_path: Path
) -> None:
    """With one process: the names, the values and the files; what several do is another matter."""
    folder, expected = plain
    lora = LoraModel.from_pretrained(wrap(base()) if before else base(), folder, is_trainable=True)
    model = lora if before else wrap(lora.model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    lora.save_pretrained(tmp_path / "again")
    again = stored(tmp_path / "again")
    assert again.keys() == stored(folder).keys()
    assert all(torch.equal(again[key], value) for key, value in stored(folder).items())


@pytest.mark.parametrize("part", ["_orig_mod.", "_checkpoint_wrapped_module.", "module."])
def test_a_file_with_wrappers_in_its_keys(part: str, plain: tuple[Path, Tensor]) -> None:
    folder, expected = plain
    place = "base_model.model." if part == "module." else "base_model.model.model.layers.0."
    state = {key.replace(place, place + part, 1): value for key, value in stored(folder).items()}
    assert state.keys() != stored(folder).keys()
    save_file(state, folder / "adapter_model.safetensors")
    torch.testing.assert_close(logits(LoraModel.from_pretrained(base(), folder)), expected, rtol=0, atol=0)


def test_a_file_of_the_backbone_alone_loads_under_the_head(tmp_path: Path, plain: tuple[Path, Tensor]) -> None:
    folder, expected = plain
    config = json.loads((folder / "adapter_config.json").read_text())
    of_backbone = {key.replace("base_model.model.model.", "base_model.model."): t for key, t in stored(folder).items()}
    save_file(of_backbone, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(logits(LoraModel.from_pretrained(base(), folder)), expected, rtol=0, atol=0)


# -- older names ---------------------------------------------------------------------------------------------


def llava() -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**text, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=64, pad_token_id=0, **text),
        image_token_index=63,
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def old(name: str) -> str:
    """As transformers 4 named it."""
    for now, before in (("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower.")):
        name = name.replace(now, before)
    return name


@pytest.mark.slow
@pytest.mark.parametrize("targets", [r".*language_model.*\.(q|v)_proj", r"language_model\.model\..*\.(q|v)_proj", None])
def test_an_adapter_of_an_older_release(targets: str | None, tmp_path: Path) -> None:
    paths = [f"model.language_model.layers.{i}.self_attn.{name}_proj" for i in range(2) for name in "qv"]
    ranks = {paths[0]: 2}
    lora = apply_lora(
        llava(),
        LoraConfig(
            r=4, target_modules=paths, rank_pattern=ranks, alpha_pattern={paths[1]: 3.0}, init_lora_weights=False
        ),
    ).eval()
    lora.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = [old(path) for path in paths] if targets is None else targets
    config["rank_pattern"] = {old(path): rank for path, rank in ranks.items()}
    config["alpha_pattern"] = {old(paths[1]): 3.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model."
    state = {prefix + old(key.removeprefix(prefix)): value for key, value in stored(tmp_path).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")

    again = LoraModel.from_pretrained(llava(), tmp_path)
    torch.testing.assert_close(logits(again), logits(lora), rtol=0, atol=0)
    again.save_pretrained(tmp_path / "again")  # from now on under today's names, and whole
    third = LoraModel.from_pretrained(llava(), tmp_path / "again")
    torch.testing.assert_close(logits(third), logits(lora), rtol=0, atol=0)
    assert all(key.startswith(prefix + "model.language_model.") for key in stored(tmp_path / "again"))


def test_names_of_no_release_are_refused(tmp_path: Path) -> None:
    apply_lora(llava(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    state = {key.replace("language_model", "text_model"): value for key, value in stored(tmp_path).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StorageError, match="text_model"):
        LoraModel.from_pretrained(llava(), tmp_path)


def test_an_adapted_embedding_in_a_wrapper_is_not_resized() -> None:
    model: Any = base()
    model.model.embed_tokens = checkpoint_wrapper(model.model.embed_tokens)
    lora: Any = apply_lora(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(AdapterError, match="get_input_embeddings"):
        lora.resize_token_embeddings(40)


@torch.no_grad()
def test_wrapped_linears_are_quantized() -> None:
    plain, model = quantize_(base(), 4), base()
    for layer in model.model.layers:
        layer.mlp.down_proj = checkpoint_wrapper(layer.mlp.down_proj)
    wrapped = quantize_(model, 4)
    assert torch.equal(plain(IDS).logits, wrapped(IDS).logits)
    assert type(module_at(wrapped, "model.layers.0.mlp.down_proj")) is not nn.Linear
