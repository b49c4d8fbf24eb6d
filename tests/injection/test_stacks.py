"""Experts in stacks: told by structure, and said of adapters that were trained when they were modules of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from qlora_kit import LoraConfig, LoraModel, apply_lora
from qlora_kit.errors import StorageError
from qlora_kit.folders import merge_folders
from qlora_kit.injection.stacks import stacks_in, taken_for_experts, why_no_branch
from qlora_kit.naming import Tree


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def test_a_stack_is_a_parameter_of_three_dimensions_of_no_layer() -> None:
    assert stacks_in(mixtral().model.layers[0].mlp.experts) == {"gate_up_proj": 3, "down_proj": 3}
    assert stacks_in(nn.Conv1d(4, 4, 3)) == {}
    flat = nn.Module()
    flat.position = nn.Parameter(torch.zeros(1, 5, 6))
    flat.token = nn.Parameter(torch.zeros(1, 1, 6))
    assert stacks_in(flat) == {}


@pytest.mark.parametrize(("above", "parts"), [("mlp", ("gate_proj",)), ("block_sparse_moe", ("w1", "w2"))])
def test_an_adapter_with_a_branch_for_each_expert_is_told_why_it_does_not_fit(
    above: str, parts: tuple[str, ...], tmp_path: Path
) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    mixtral().save_pretrained(base)
    adapter.mkdir()
    branches = [f"{above}.experts.{expert}.{part}" for expert in range(3) for part in parts]
    paths = [f"base_model.model.model.layers.0.{branch}" for branch in ("self_attn.q_proj", *branches)]
    save_file(
        {
            f"{path}.lora_{side}.weight": torch.ones(size)
            for path in paths
            for side, size in (("A", (1, 16)), ("B", (16, 1)))
        },
        adapter / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj", *parts]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    message = (
        rf"model\.layers\.0\.{above}\.experts\.0\.{parts[0]} is a branch of one expert, but "
        r"model\.layers\.0\.mlp\.experts keeps its experts in stacks \(gate_up_proj, down_proj\), which no adapter can "
    )
    with pytest.raises(StorageError, match=message):
        LoraModel.from_pretrained(mixtral(), adapter)
    with pytest.raises(StorageError, match=message):
        merge_folders(base, [adapter], tmp_path / "out", into="float32")


def test_nothing_is_said_where_there_is_no_stack() -> None:
    tree = Tree(mixtral())
    assert why_no_branch(tree, ["model.layers.0.self_attn.r_proj", "model.layers.7.mlp.gate"]) == ""


def test_names_beside_stacked_experts_that_others_take_for_theirs_are_said_at_save(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = mixtral()
    model.model.layers[0].shared = nn.ModuleDict({"up_proj": nn.Linear(16, 16)})
    own = "model.layers.0.shared.up_proj"
    assert taken_for_experts(Tree(model), [own, "model.layers.0.self_attn.q_proj"]) == [own]
    apply_lora(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).save_pretrained(tmp_path / "both")
    assert f"take the names of 1 adapted layers, {own} for one" in caplog.text
    caplog.clear()
    apply_lora(mixtral(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "attention")
    assert "experts" not in caplog.text
