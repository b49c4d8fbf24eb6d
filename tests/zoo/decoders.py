"""Dense causal language models."""

from __future__ import annotations

from typing import Any

from .batches import HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, text, text_class
from .member import of_transformers

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDTHS = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **WIDTHS,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 128,
    **SPECIAL,
}
#: With fewer heads for keys and values.
GROUPED = {**BASE, "num_key_value_heads": 2}


def causal(name: str, stem: str, settings: dict[str, Any], kind: str = "decoders", **traits: Any) -> None:
    """Register transformers' ``{stem}ForCausalLM``."""
    own = {"config_class": f"{stem}Config", "batch": text, "head": ("lm_head",), "generates": True, **traits}
    of_transformers(name, kind, own.pop("model_class", f"{stem}ForCausalLM"), settings=settings, **own)


causal("llama", "Llama", GROUPED)
causal("llama-tied", "Llama", {**GROUPED, "tie_word_embeddings": True})
causal("mistral", "Mistral", GROUPED)
causal("qwen2", "Qwen2", {**GROUPED, "tie_word_embeddings": True})
causal("qwen3", "Qwen3", {**GROUPED, "head_dim": 16})
causal("gemma", "Gemma", {**GROUPED, "head_dim": 16})
causal("gemma2", "Gemma2", {**GROUPED, "head_dim": 16, "sliding_window": 8})
causal("gemma3-text", "Gemma3", {**GROUPED, "head_dim": 16, "sliding_window": 8}, config_class="Gemma3TextConfig")
causal("phi", "Phi", BASE)
causal("phi3", "Phi3", GROUPED)
causal("stablelm", "StableLm", GROUPED)
causal("olmo", "Olmo", GROUPED)
causal("olmo2", "Olmo2", GROUPED)
causal("cohere", "Cohere", GROUPED)
causal("granite", "Granite", GROUPED)
causal("smollm3", "SmolLM3", GROUPED)
causal("starcoder2", "Starcoder2", GROUPED)
causal("gpt-neox", "GPTNeoX", BASE)

_GPT = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128, **SPECIAL}
causal("gpt2", "GPT2", _GPT, model_class="GPT2LMHeadModel")
causal("gptj", "GPTJ", {**_GPT, "rotary_dim": 8})
_OPT = {**BASE, "ffn_dim": INTERMEDIATE, "word_embed_proj_dim": HIDDEN}
causal("opt", "OPT", {name: value for name, value in _OPT.items() if name != "intermediate_size"})
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, **SPECIAL}
causal("bloom", "Bloom", _BLOOM)
causal(
    "falcon",
    "Falcon",
    {"vocab_size": VOCABULARY, **WIDTHS, **SPECIAL},
    impossible={stage: "the loader knows nn.Linear itself only" for stage in ("4 bits", "4 bits saved")},
)
_MPT = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64, **SPECIAL}
causal("mpt", "Mpt", _MPT)

of_transformers(
    "llama-classes",
    "decoders",
    "LlamaForSequenceClassification",
    "LlamaConfig",
    GROUPED,
    text_class,
    head=("score",),
)
