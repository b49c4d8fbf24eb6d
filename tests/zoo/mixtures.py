"""Causal language models with experts; transformers keeps these as 3-D stacks, which no adapter reaches."""

from __future__ import annotations

from typing import Any

from .decoders import BASE, GROUPED, causal
from .member import UNKNOWN

FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 16}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64, "v_head_dim": 16},
    **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "moe_intermediate_size": 64},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}


def mixture(name: str, stem: str, settings: dict[str, Any], **traits: Any) -> None:
    """Register a causal language model with stacked experts."""
    causal(name, stem, settings, "mixtures", **{"aside": ("experts",), **traits})


mixture("mixtral", "Mixtral", {**GROUPED, **FOUR})
mixture("qwen2-moe", "Qwen2Moe", {**GROUPED, **QWEN, "shared_expert_intermediate_size": 64})
mixture("qwen3-moe", "Qwen3Moe", {**GROUPED, **QWEN})
mixture("olmoe", "Olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2})
mixture("deepseek-v2", "DeepseekV2", {**BASE, **LATENT}, refuses=UNKNOWN)
mixture("deepseek-v3", "DeepseekV3", {**BASE, **LATENT, "n_group": 2, "topk_group": 1}, refuses=UNKNOWN)
mixture("granite-moe", "GraniteMoe", {**GROUPED, **FOUR})
mixture("phimoe", "Phimoe", {**GROUPED, **FOUR}, aside=("experts", "router"))
mixture(
    "llama4-text",
    "Llama4",
    {
        **{**GROUPED, "head_dim": 16, "intermediate_size_mlp": 128, "attention_chunk_size": 64},
        **{"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    },
    config_class="Llama4TextConfig",
    aside=("experts", "router"),
    impossible={"4 bits saved": "transformers stores its experts under names that it doesn't load"},
)
mixture(
    "gpt-oss",
    "GptOss",
    {
        **{**GROUPED, **FOUR, "head_dim": 16, "sliding_window": 8},
        **{"layer_types": ["sliding_attention", "full_attention"]},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    },
)
