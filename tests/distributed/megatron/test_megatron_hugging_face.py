"""Adapters of a Megatron model in the Hugging Face model of the same weights: logits are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_gpt import VOCABULARY, batch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_kit import LoraModel

pytestmark = pytest.mark.slow

LAYERS, WIDTH, HEADS, GROUPS, INNER = 2, 32, 4, 2, 64
HEAD = WIDTH // HEADS


def llama(run: dict[str, Any]) -> LlamaForCausalLM:
    """transformers' Llama with the weights of Megatron's model, written out head by head."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    weights, norms = run["weights"], run["norms"]
    state: dict[str, Tensor] = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings"].T,
        "lm_head.weight": weights["output_layer"],
        "model.norm.weight": norms["decoder.final_layernorm.weight"],
    }
    for n in range(LAYERS):
        here, there = f"decoder.layers.{n}", f"model.layers.{n}"
        heads = list(weights[f"{here}.self_attention.linear_qkv"].split(HEAD))  # q q k v, q q k v
        q = [heads[i] for i in (0, 1, 4, 5)]
        inner = weights[f"{here}.mlp.linear_fc1"]
        state |= {
            f"{there}.self_attn.q_proj.weight": torch.cat(q),
            f"{there}.self_attn.k_proj.weight": torch.cat([heads[2], heads[6]]),
            f"{there}.self_attn.v_proj.weight": torch.cat([heads[3], heads[7]]),
            f"{there}.self_attn.o_proj.weight": weights[f"{here}.self_attention.linear_proj"],
            f"{there}.mlp.gate_proj.weight": inner[:INNER],
            f"{there}.mlp.up_proj.weight": inner[INNER:],
            f"{there}.mlp.down_proj.weight": weights[f"{here}.mlp.linear_fc2"],
            f"{there}.input_layernorm.weight": norms[f"{here}.input_layernorm.weight"],
            f"{there}.post_attention_layernorm.weight": norms[f"{here}.pre_mlp_layernorm.weight"],
        }
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def logits(model: Any) -> Tensor:
    words, positions, _ = batch()
    with torch.no_grad():
        found: Tensor = model(input_ids=words, position_ids=positions).logits
    return found


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.parametrize("name", ["exported", "exported parts"])
def test_an_exported_adapter_computes_the_same(name: str, runs: Any, folder: Path) -> None:
    run = runs[2][0][name]
    close = {"rtol": 1e-4, "atol": 5e-6}
    torch.testing.assert_close(logits(llama(run)), run["base"], **close)
    assert (run["logits"] - run["base"]).abs().max() > 0.1

    peft = pytest.importorskip("peft")
    with_peft = peft.PeftModel.from_pretrained(llama(run), str(folder / name))
    torch.testing.assert_close(logits(with_peft), run["logits"], **close)
    ours = LoraModel.from_pretrained(llama(run), folder / name)
    torch.testing.assert_close(logits(ours), run["logits"], **close)

    stored = json.loads((folder / name / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == "some/model"
    assert {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "o_proj", "down_proj"} <= set(
        stored["target_modules"]
    )
    assert stored["rank_pattern"] == {f"model.layers.{n}.self_attn.o_proj": 2 for n in range(LAYERS)}
    assert "megatron_config" not in stored
