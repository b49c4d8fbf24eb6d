"""A branch in a module whose weight isn't its matrix: refused on disk by path, type and reason, before anything is
written; without one it is copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig

from qlora_kit import LoraConfig, apply_lora
from qlora_kit.errors import UnsupportedModuleError
from qlora_kit.folders import merge_folders

ROUTER = "model.layers.0.feed_forward.router"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Llama 4 with a router, and an adapter of all its linears that a codec holds."""
    base, adapter = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16, "head_dim": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1}
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **experts, **tokens))
    model.save_pretrained(base)
    settings = {"target_modules": "all-linear", "exclude_modules": ["experts"], "init_lora_weights": False}
    lora = apply_lora(model, LoraConfig(r=2, **settings))
    assert not any("router" in path for path in lora.adapter_layers())
    lora.save_pretrained(adapter)
    return base, adapter


def test_it_is_copied(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    merge_folders(base, [adapter], tmp_path / "out", into="same")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert torch.equal(after[f"{ROUTER}.weight"], before[f"{ROUTER}.weight"])
    assert not torch.equal(
        after["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )


def test_a_branch_in_it_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    foreign = tmp_path / "adapter"
    foreign.mkdir()
    for file in adapter.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    branch = {"lora_A": torch.ones(2, 16), "lora_B": torch.ones(2, 2)}
    tensors = {f"base_model.model.{ROUTER}.{name}.weight": factor for name, factor in branch.items()}
    save_file({**load_file(adapter / "adapter_model.safetensors"), **tensors}, foreign / "adapter_model.safetensors")
    config = json.loads((foreign / "adapter_config.json").read_text())
    config["target_modules"] = [*config["target_modules"], "router"]
    (foreign / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModuleError, match=rf"^{ROUTER}: expected a weight .*Llama4Router .*returns a tuple"):
        merge_folders(base, [foreign], tmp_path / "out")
    assert not (tmp_path / "out").exists()
