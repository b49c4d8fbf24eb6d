"""Which modules to adapt when the user names none: the attention's query and value projections.

The choice of the original LoRA paper (Hu et al. 2021, section 7.1) and, model type for model type, PEFT's.
Model types that aren't listed get the first naming scheme below that the model uses.
"""

from __future__ import annotations

_QUERY_VALUE: dict[tuple[str, ...], str] = {
    (
        "q_proj",
        "v_proj",
    ): "bart opt gptj gpt_neo llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("q", "v"): "t5 mt5",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("qkv_proj",): "codegen",
    ("Wqkv",): "mpt",
}

#: Target names by ``config.model_type``.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    **{kind: names for names, kinds in _QUERY_VALUE.items() for kind in kinds.split()},
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
}


def default_targets(model_type: str | None, leaf_names: set[str]) -> tuple[str, ...] | None:
    """Names to target for ``model_type``, else the first known scheme all of whose names the model has."""
    if model_type in DEFAULT_TARGETS:
        return DEFAULT_TARGETS[model_type]
    return next((names for names in _QUERY_VALUE if set(names) <= leaf_names), None)
