"""Default targets: PEFT's where an architecture has the same layers throughout, every layer where it hasn't."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import nn

from qlora_kit import LoraConfig
from qlora_kit.injection.targets import resolve

TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
HEADS = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 8}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ONE_IN_FOUR = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]

# What is adapted in a layer without attention, and in one with it.
HYBRIDS: dict[str, tuple[str, dict[str, Any], set[str], set[str]]] = {
    "NemotronH": (
        "NemotronHConfig",
        {
            **{**HEADS, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "head_dim": 8, "chunk_size": 8},
            **{"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1},
        },
        {"in_proj", "out_proj", "up_proj", "down_proj"},
        {"q_proj", "k_proj", "v_proj", "o_proj"},
    ),
    "Bamba": ("BambaConfig", {**HEADS, **MAMBA2, "attn_layer_indices": [3]}, {"in_proj", "out_proj"}, set()),
    "RecurrentGemma": (
        "RecurrentGemmaConfig",
        {**HEADS, "lru_width": 32, "attention_window_size": 16},
        {"linear_x", "linear_y", "linear_out"},
        set(),
    ),
    "Lfm2": (
        "Lfm2Config",
        {**HEADS, "layer_types": ["conv", "full_attention", "conv", "conv"]},
        {"in_proj", "out_proj"},
        set(),
    ),
    "Qwen3Next": (
        "Qwen3NextConfig",
        {
            **{**HEADS, **LINEAR, "head_dim": 8, "layer_types": ONE_IN_FOUR, "num_experts": 2},
            **{"num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        },
        {"in_proj_qkvz", "in_proj_ba", "out_proj"},
        set(),
    ),
    "GraniteMoeHybrid": (
        "GraniteMoeHybridConfig",
        {
            **{**HEADS, **MAMBA2, **EXPERTS, "shared_intermediate_size": 32},
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
        },
        {"in_proj", "out_proj"},
        set(),
    ),
}


def meta(stem: str, config: str, settings: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return getattr(transformers, f"{stem}ForCausalLM")(getattr(transformers, config)(**settings))


def by_layer(model: nn.Module, **fields: Any) -> dict[int, set[str]]:
    found: dict[int, set[str]] = {}
    for target in resolve(model, LoraConfig(**fields)):
        for path in (target.path, *target.aliases):
            layer = re.search(r"layers\.(\d+)\.", path)
            assert layer is not None
            found.setdefault(int(layer[1]), set()).add(path.rpartition(".")[2])
    return found


@pytest.mark.parametrize(("stem", "case"), HYBRIDS.items(), ids=HYBRIDS)
def test_every_layer_of_a_hybrid_is_reached(stem: str, case: tuple[str, dict[str, Any], set[str], set[str]]) -> None:
    config, settings, elsewhere, attention = case
    found = by_layer(meta(stem, config, settings))
    assert list(found) == [0, 1, 2, 3]
    with_attention = {layer for layer, names in found.items() if "q_proj" in names}
    assert 0 < len(with_attention) < 4
    assert all(found[layer] == (attention or {"q_proj", "v_proj"}) for layer in with_attention)
    assert set.union(*(found[layer] for layer in found if layer not in with_attention)) == elsewhere


@pytest.mark.slow
def test_jamba_and_a_layer_that_has_attention_beside_a_recurrence() -> None:
    period = {"attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 2, "num_experts_per_tok": 1}
    found = by_layer(meta("Jamba", "JambaConfig", {**HEADS, **period, "mamba_d_state": 4}))
    assert found[3] == {"q_proj", "v_proj"}
    for layer in range(3):
        assert {"in_proj", "out_proj"} < found[layer] <= {"in_proj", "out_proj", "x_proj", "dt_proj"}

    both = {"head_dim": 8, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    found = by_layer(meta("FalconH1", "FalconH1Config", {**HEADS, **both, "mamba_n_groups": 1}))
    assert found == {layer: {"q_proj", "v_proj"} for layer in range(4)}


class Unheard(nn.Module):
    """Layers of three kinds, in a model without a config."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block(kind) for kind in kinds)
        self.tower = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(2, 2)}) for _ in range(2))

    @staticmethod
    def block(kind: str) -> nn.Module:
        parts: dict[str, nn.Module] = {"mlp": nn.ModuleDict({"up": nn.Linear(2, 2)})}
        if kind == "a":
            parts["mixer"] = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
        if kind == "r":
            parts["recurrence"] = nn.ModuleDict({"gate": nn.Linear(2, 2)})
        if kind == "n":
            return nn.ModuleDict({"norm": nn.LayerNorm(2)})
        return nn.ModuleDict(parts)


def test_it_is_a_rule_and_no_list_of_names() -> None:
    paths = [target.path for target in resolve(Unheard("arfn"), LoraConfig())]
    assert paths == ["blocks.0.mixer.q_proj", "blocks.0.mixer.v_proj", "blocks.1.recurrence.gate", "blocks.2.mlp.up"]
    asked = {"layers_to_transform": [1, 2], "exclude_modules": ["up"]}
    assert [target.path for target in resolve(Unheard("arfn"), LoraConfig(**asked))] == ["blocks.1.recurrence.gate"]


UNIFORM = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", HEADS),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", HEADS),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}),
    "BERT": ("BertModel", "BertConfig", {**TEXT, "num_attention_heads": 4}),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    ),
    "OPT": (
        "OPTForCausalLM",
        "OPTConfig",
        {**TEXT, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    ),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", {**HEADS, **EXPERTS}),
}


@pytest.mark.parametrize(("kind", "config", "settings"), UNIFORM.values(), ids=UNIFORM)
def test_where_all_layers_are_alike_the_targets_are_peft_s(kind: str, config: str, settings: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings))
    names = PEFT_TARGETS[model.config.model_type]
    expected = {path for path, _ in model.named_modules() if path.rpartition(".")[2] in names}
    assert {target.path for target in resolve(model, LoraConfig())} == expected
