"""Language models that read one text and write another."""

from __future__ import annotations

from typing import Any

from .batches import HEADS, HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY, text_pair
from .decoders import SPECIAL
from .member import LOST_IN_TWO_BITS, of_transformers

T5 = {
    **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": INTERMEDIATE, "num_heads": HEADS},
    **{"num_layers": LAYERS, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
BART: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "d_model": HIDDEN, "max_position_embeddings": 128, **SPECIAL},
    **{"encoder_layers": LAYERS, "encoder_ffn_dim": INTERMEDIATE, "encoder_attention_heads": HEADS},
    **{"decoder_layers": LAYERS, "decoder_ffn_dim": INTERMEDIATE, "decoder_attention_heads": HEADS},
    **{"decoder_start_token_id": 1, "forced_eos_token_id": 2},
}


def writing(name: str, model_class: str, config_class: str, settings: dict[str, Any], **traits: Any) -> None:
    """Register an encoder-decoder with an ``lm_head``."""
    own = {"head": ("lm_head",), "generates": True, **traits}
    of_transformers(name, "encoder_decoders", model_class, config_class, settings, text_pair, **own)


writing("t5", "T5ForConditionalGeneration", "T5Config", T5, refuses=LOST_IN_TWO_BITS)
writing("t5-gated", "T5ForConditionalGeneration", "T5Config", {**T5, **GATED}, refuses=LOST_IN_TWO_BITS)
writing("mt5", "MT5ForConditionalGeneration", "MT5Config", {**T5, **GATED}, refuses=LOST_IN_TWO_BITS)
writing("bart", "BartForConditionalGeneration", "BartConfig", BART)
writing("mbart", "MBartForConditionalGeneration", "MBartConfig", BART)
writing("marian", "MarianMTModel", "MarianConfig", BART)
writing("pegasus", "PegasusForConditionalGeneration", "PegasusConfig", BART)
_SWITCH = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64}
writing(
    "switch",
    "SwitchTransformersForConditionalGeneration",
    "SwitchTransformersConfig",
    {**T5, **_SWITCH, "num_decoder_layers": LAYERS},
    impossible={stage: "transformers reads the dtype of wo's weight" for stage in ("4 bits", "4 bits saved")},
    unused=r".*\.experts\..*",  # where a word goes changes with training
    refuses=LOST_IN_TWO_BITS,
)
