"""Causal language models with a recurrence, alone or between attention layers."""

from __future__ import annotations

from qlora_kit import TargetError

from .batches import text_alone
from .decoders import GROUPED, SPECIAL, causal
from .member import LOST_IN_TWO_BITS, Refusal

_ALONE = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, **SPECIAL}
_MAMBA2 = {"mamba_d_state": 16, "chunk_size": 8}

causal(
    "mamba",
    "Mamba",
    {**_ALONE, "state_size": 8},
    "state_space",
    batch=text_alone,
    aside=("dt_proj",),
    impossible={stage: "transformers multiplies by dt_proj's codes" for stage in ("4 bits", "4 bits saved")},
)
causal(
    "mamba2",
    "Mamba2",
    {**_ALONE, "state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "state_space",
    batch=text_alone,
)
causal("falcon-mamba", "FalconMamba", {**_ALONE, "state_size": 8}, "state_space", batch=text_alone, aside=("dt_proj",))
causal(
    "jamba",
    "Jamba",
    {
        **{**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    },
    "state_space",
    aside=("dt_proj", "experts"),
)
causal(
    "recurrent-gemma",
    "RecurrentGemma",
    {**GROUPED, "num_hidden_layers": 3, "lru_width": 64, "attention_window_size": 16},
    "state_space",
)
causal(
    "nemotron-h",
    "NemotronH",
    {
        **{**GROUPED, "num_hidden_layers": 3, "hybrid_override_pattern": "M*-", "head_dim": 16, "chunk_size": 8},
        **{"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16},
    },
    "state_space",
)
causal(
    "zamba2",
    "Zamba2",
    {
        **{**GROUPED, **_MAMBA2, "num_key_value_heads": 4, "n_mamba_heads": 8, "num_mem_blocks": 1, "adapter_rank": 8},
        **{"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    },
    "state_space",
    targets=["in_proj", "out_proj", "linear"],  # the others are shared between layers
    refuses={stage: Refusal(TargetError, "its weight is tied to") for stage in ("all-linear", "default targets")},
)
causal(
    "bamba",
    "Bamba",
    {
        **{**GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16},
        **{"mamba_d_state": 16, "mamba_chunk_size": 8},
    },
    "state_space",
)
causal("lfm2", "Lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"]}, "state_space")
causal(
    "rwkv",
    "Rwkv",
    {**_ALONE, "attention_hidden_size": 64, "intermediate_size": 128, "context_length": 64},
    "state_space",
    batch=text_alone,
    head=("head",),
    aside_in_4_bits=("attention.output", "feed_forward.value"),
    refuses=LOST_IN_TWO_BITS,
    impossible={"generate": "its cache changes what it computes"},
)
